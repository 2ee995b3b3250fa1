"""Pure tensor functions: no modules, no configs, no files.

Each function states its shapes, its error and its source. Nothing is imported here, so that
`import kernels` costs nothing; import the module you need.
"""

__all__ = [
    "at_least_fp32",
    "attention",
    "block_scaled_mm",
    "codes",
    "compilation",
    "cross_entropy",
    "diagnostics",
    "double_scales",
    "emulate",
    "float8_mm",
    "format_names",
    "formats",
    "frozen",
    "grouped",
    "hadamard",
    "native",
    "newton_schulz",
    "packed",
    "philox",
    "quantise",
    "quantised_linear",
    "quantiser",
    "recurrence",
    "recurrence_flops",
    "rotary",
    "scaled_mm",
    "short_conv",
    "state_pass",
    "tensor_cores",
    "triton_blocks",
    "triton_check",
    "triton_hadamard",
    "triton_nvfp4",
    "triton_philox",
    "triton_rounding",
    "triton_state_pass",
]
