"""GPUs by name: peak speed, memory and the formats that their tensor cores compute.

Sources: vendor datasheets, dense peaks without sparsity.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak speeds and memory of a GPU.

    Args:
        fp32: FLOP/s; those of TF32 where the GPU has it.
        bf16: FLOP/s; None where it is not supported.
        memory_gb: in units of 1e9 bytes.
        capability: the CUDA compute capability, (major, minor).
    """

    fp32: float
    bf16: float | None
    memory_gb: float
    capability: tuple[int, int]

    def peak(self, compute: str) -> float | None:
        """Return the FLOP/s for a `precision.compute`, None where the format is not supported."""
        return self.bf16 if compute == "bf16" else self.fp32


# A device is the first entry whose key its own name contains.
GPUS = {
    "V100": Gpu(15.7e12, None, 32, (7, 0)),
    "A100-SXM4-40GB": Gpu(156e12, 312e12, 40, (8, 0)),
    "A100-PCIE-40GB": Gpu(156e12, 312e12, 40, (8, 0)),
    "A100": Gpu(156e12, 312e12, 80, (8, 0)),
    "H100": Gpu(495e12, 989e12, 80, (9, 0)),
    "H200": Gpu(495e12, 989e12, 141, (9, 0)),
    "B200": Gpu(1125e12, 2250e12, 180, (10, 0)),
}


def gpu_named(name: str) -> Gpu | None:
    """Return the table's entry for a device name ("NVIDIA H200" or "h200"), None if unlisted."""
    upper = name.upper()
    return next((gpu for key, gpu in GPUS.items() if key in upper), None)
