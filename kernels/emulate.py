"""Operands of a GEMM as low-precision hardware sees them, in bf16 and ready for a bf16 product.

Every product of an E2M1 or FP8 element with an E4M3 or power-of-two scale is exact in bf16. So an
operand is elements * scales in bf16 plus an fp32 factor for the epilogue: a bf16 GEMM with fp32
accumulation then gives what the low-precision tensor core gives (TransformerEngine's reference, on
every bf16 output of 256 x 256 x 4096). FP8 with fp32 block scales is not exact that way: there the
scales stay apart and the product is made block by block.

Shape legend: rows, cols of the operand in memory; `dim` is the one that the GEMM sums over.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kernels.compilation import Compiler, Function, current_compiler
from kernels.format_names import DOUBLE
from kernels.formats import E2M1, encode_e8m0, encode_positive_e4m3, quotient
from kernels.philox import Dice, Draw
from kernels.quantise import TENSOR, Block, check_blocks
from kernels.quantiser import Quantiser
from kernels.triton_check import triton_agrees


@dataclass(frozen=True)
class Operand:
    """An operand in bf16 and the factor of its product: numerator / denominator.

    Args:
        scales: one for each `block`, where they are not folded into `values`.
        folded: bytes of the scales that are folded into `values`, E4M3 or E8M0.
        format: what tensor cores multiply by `kernels.block_scaled_mm`, "" where the product is
            bf16's.
    """

    values: Float[Tensor, "rows cols"]
    numerator: Float[Tensor, "..."] | None = None
    denominator: float = 1.0
    scales: Float[Tensor, "block_rows block_cols"] | None = None
    block: Block = (1, 1)
    folded: UInt8[Tensor, "folded_rows folded_cols"] | None = None
    format: str = ""

    def dequantised(self) -> Float[Tensor, "rows cols"]:
        """Return the operand in fp32, its factor and scales applied.

        NVFP4 is (element * scale) * (amax / 2688), as in a GEMM; TransformerEngine's kernel
        multiplies element * ((scale * amax) * (1 / 2688)), one step of bf16 away at some ties.
        """
        values = self.values.float()
        if self.scales is not None:
            of_rows = self.scales.repeat_interleave(self.block[0], 0)
            values = values * of_rows.repeat_interleave(self.block[1], 1)
        if self.numerator is not None:
            values = values * quotient(self.numerator, self.denominator)
        return values


def emulate(
    x: Float[Tensor, "rows cols"],
    quantiser: Quantiser,
    dim: int,
    *,
    draw: Draw | None = None,
    amax: Float[Tensor, ""] | None = None,
) -> Operand:
    """Return `x` quantised as an operand of a GEMM that sums over its dimension `dim`.

    Args:
        draw: dice of stochastic rounding, None rounds to nearest.
        amax: the magnitude that the scale of the tensor stands for, None that of `x`.

    Raises:
        ValueError: a size is not a multiple of the block's.
    """
    quantiser = quantiser.along(dim)
    check_blocks(x, quantiser.span)
    values, numerator, scales, folded = torch.ops.espalier.quantise(
        x,
        *address(draw),
        amax,
        quantiser.format,
        list(quantiser.block),
        quantiser.scale,
        quantiser.sr_headroom,
        quantiser.element_headroom,
        quantiser.four_over_six,
        quantiser.e4m3_max,
        quantiser.row_scaled,
        quantiser.group,
    )
    block_scales = scales if quantiser.apart else None
    block = quantiser.apart or quantiser.block
    return Operand(values, numerator, quantiser.denominator, block_scales, block, folded)


# A constant: torch.compile would trace the comparison.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_triton(device: torch.device) -> bool:
    """Return whether the Triton kernels of NVFP4 compute on `device`."""
    return triton_agrees(device, _compare)


def _compare(device: torch.device) -> None:
    """Raise ValueError where a Triton kernel differs from the reference."""
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    key = torch.tensor([-5, 3], dtype=torch.int32, device=device)
    draw = Draw(Dice(torch.tensor([7, 1 << 40], device=device), key), 9, 128)
    nvfp4 = [Quantiser(format="nvfp4", block=block) for block in ((1, 16), (16, 1), (16, 16))]
    others = [
        Quantiser(format="mxfp4", block=(1, 32), scale="rceil"),
        Quantiser(format="mxfp8_e4m3", block=(32, 1), scale="floor"),
        Quantiser(format="fp8_e5m2", block=TENSOR),
        Quantiser(format="fp8_e4m3", block=(1, 128), scale="power_of_two"),
        Quantiser(format="fp8_e4m3", block=(128, 128), scale="fp32"),
    ]
    for quantiser in nvfp4 + others:
        for chosen in (None, draw) if quantiser.elements is E2M1 else (None,):
            made = _by_triton(quantiser, x, chosen, None)
            bits = None if chosen is None else chosen.bits(*x.shape)
            for a, b in zip(made or (), _reference(quantiser, x, bits, None), strict=True):
                if not torch.equal(a, b):
                    raise ValueError(f"{quantiser} differs from the reference")
    from kernels import triton_nvfp4  # noqa: PLC0415

    kept = nvfp4[1](x)
    expanded = triton_nvfp4.expand(*kept.packed(), kept.block)
    if not torch.equal(expanded, kept.scaled().bfloat16()):
        raise ValueError("codes of NVFP4 do not come back as they were")


def address(draw: Draw | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Return `draw` as arguments of an op."""
    return (
        (None, None, 0, 0)
        if draw is None
        else (draw.dice.samples, draw.dice.key, draw.stream, draw.tokens)
    )


def draw_at(samples: Tensor | None, key: Tensor | None, stream: int, tokens: int) -> Draw | None:
    """Return the draw of `address`."""
    return None if samples is None or key is None else Draw(Dice(samples, key), stream, tokens)


@torch.library.custom_op("espalier::quantise", mutates_args=())
def _quantise(
    x: Tensor,
    samples: Tensor | None,
    key: Tensor | None,
    stream: int,
    tokens: int,
    amax: Tensor | None,
    format: str,
    block: list[int],
    scale: str,
    sr_headroom: float,
    element_headroom: float,
    four_over_six: str,
    e4m3_max: int,
    row_scaled: bool,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantiser = Quantiser(
        format=format,  # type: ignore[arg-type]
        block=(block[0], block[1]),
        scale=scale,
        sr_headroom=sr_headroom,
        element_headroom=element_headroom,
        four_over_six=four_over_six,
        e4m3_max=e4m3_max,  # type: ignore[arg-type]
        row_scaled=row_scaled,
        group=group,
    )
    draw = draw_at(samples, key, stream, tokens)
    if has_triton(x.device):
        made = _by_triton(quantiser, x, draw, amax)
        if made is not None:
            return made
    bits = None if draw is None else draw.bits(*x.shape)
    if x.device.type == "cpu":
        has_bits, has_amax = bits is not None, amax is not None
        run = _on_cpu(quantiser, x.dtype, has_bits, has_amax, current_compiler())
        optional = [tensor for tensor in (bits, amax) if tensor is not None]
        values, numerator, scales, folded = run(x.contiguous(), *optional)
        return values, numerator, scales, folded
    return _reference(quantiser, x, bits, amax)


@_quantise.register_fake
def _(
    x: Tensor,
    samples: Tensor | None,
    key: Tensor | None,
    stream: int,
    tokens: int,
    amax: Tensor | None,
    format: str,
    block: list[int],
    scale: str,
    sr_headroom: float,
    element_headroom: float,
    four_over_six: str,
    e4m3_max: int,
    row_scaled: bool,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    lines = (rows, 1) if block[0] == 1 else (1, cols)
    numerator = x.new_empty(lines if row_scaled else (), dtype=torch.float32)
    quantiser = Quantiser(format=format, block=(block[0], block[1]), scale=scale, group=group)  # type: ignore[arg-type]
    apart = quantiser.apart
    shape = (rows // apart[0], cols // apart[1]) if apart else (0, 0)
    folded = (rows // block[0], cols // block[1]) if quantiser.folds else (0, 0)
    return (
        x.new_empty(rows, cols, dtype=torch.bfloat16),
        numerator,
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(folded, dtype=torch.uint8),
    )


def _by_triton(
    quantiser: Quantiser, x: Tensor, draw: Draw | None, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return what `_reference` does, by Triton kernels; None for variants that they do not know."""
    from kernels import triton_blocks, triton_nvfp4  # noqa: PLC0415

    fmt, block, headroom = quantiser.elements, quantiser.block, quantiser.sr_headroom
    apart, none = x.new_empty(0, 0, dtype=torch.float32), x.new_empty(0, 0, dtype=torch.uint8)
    if quantiser.group or (draw is not None and x.shape[1] % 16):
        return None
    if quantiser.simple_nvfp4 and amax is None:
        values, numerator, folded = triton_nvfp4.quantise(x, block, draw, headroom=headroom)
        return values, numerator, apart, folded
    if quantiser.format.startswith("mx") and max(block) == 32:
        grow = quantiser.element_headroom
        values, numerator, folded = triton_blocks.quantise_mx(
            x, fmt, block, quantiser.scale, draw, headroom=headroom, element_headroom=grow
        )
        return values, numerator, apart, folded
    if not quantiser.format.startswith("fp8"):
        return None
    if block == TENSOR:
        return *triton_blocks.quantise_fp8_tensor(x, fmt, amax), apart, none
    if max(block) != 128:
        return None
    single = quantiser.scale != "fp32"
    values, numerator, scales = triton_blocks.quantise_fp8(x, fmt, block, powers_of_two=single)
    return (values, numerator, apart, scales) if single else (values, numerator, scales, none)


def _reference(
    quantiser: Quantiser, x: Tensor, bits: Tensor | None, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (values, numerator, scales apart, bytes of folded scales); [0, 0] where none are."""
    quantised = quantiser(x, bits, amax)
    numerator = quantised.numerator.clone()
    apart, none = x.new_empty(0, 0, dtype=torch.float32), x.new_empty(0, 0, dtype=torch.uint8)
    if quantiser.stacked:
        return quantised.elements.bfloat16(), numerator, quantised.scales.clone(), none
    if quantiser.scale == DOUBLE and quantiser.apart:
        rows, cols = quantiser.apart
        apart = quantised.outer[::rows, ::cols].clone()
    encode = encode_positive_e4m3 if quantised.scale_format == "e4m3" else encode_e8m0
    folded = encode(quantised.scales) if quantiser.folds else none
    return quantised.scaled().bfloat16(), numerator, apart, folded


@lru_cache
def _on_cpu(
    quantiser: Quantiser, dtype: torch.dtype, has_bits: bool, has_amax: bool, compiler: Compiler
) -> Function:
    """Return the reference of `quantiser` for inputs of `dtype`, compiled by `compiler`."""
    rows, cols = (max(1, size) for size in quantiser.span)
    example = [torch.randn(4 * rows, 4 * cols).to(dtype)]
    free = [{0: f"{rows}*r" if rows > 1 else "r", 1: f"{cols}*c" if cols > 1 else "c"}]
    if has_bits:
        example.append(torch.zeros(4 * rows, 4 * cols, dtype=torch.uint8))
        free *= 2
    if has_amax:
        example.append(torch.ones(()))
        free.append({})
    parts = (
        quantiser.format,
        *quantiser.block,
        quantiser.scale,
        quantiser.sr_headroom,
        quantiser.element_headroom,
        quantiser.four_over_six,
        quantiser.e4m3_max,
        quantiser.row_scaled,
        quantiser.group,
        dtype,
        has_bits,
        has_amax,
    )
    name = "quantise-" + "-".join(str(part).removeprefix("torch.") for part in parts)
    function = partial(_with_optional, quantiser, has_bits)
    return compiler(function, name, tuple(example), tuple(free))


def _with_optional(
    quantiser: Quantiser, has_bits: bool, x: Tensor, *optional: Tensor
) -> tuple[Tensor, ...]:
    """Call the reference with those of (bits, amax) that there are."""
    bits = optional[0] if has_bits else None
    amax = optional[-1] if len(optional) > has_bits else None
    return _reference(quantiser, x, bits, amax)
