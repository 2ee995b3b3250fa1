"""Block quantisation as published: NVFP4, MXFP4, MXFP8 and FP8.

All return x = elements * scales * outer, elements being values of a small format, `scales` one
number a block, `outer` one a tensor (or a row). The order of operations is that of the
implementations that trained the published models; every constant is fp32.

Sources: NVFP4 arXiv 2509.25149 and TransformerEngine >= 2.14 (its reference, bit for bit); OCP
Microscaling v1.0; DeepSeek-V3 arXiv 2412.19437; four over six arXiv 2512.02010.

Shape legend: rows, cols of the tensor; block = (rows, cols) of one block.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kernels.formats import (
    E1M2,
    E2M1,
    E4M3,
    FloatFormat,
    encode,
    encode_e8m0,
    pack,
    quotient,
    round_nearest,
    round_scale,
    round_stochastic,
    round_stochastic_e2m1,
)

Block = tuple[int, int]
ScaleOrder = Literal["te214", "paper"]
TENSOR: Block = (0, 0)  # one block: the tensor
_FLT_MAX = torch.finfo(torch.float32).max
E4M3Max = Literal[448, 256]  # the scale that the largest block gets


@dataclass(frozen=True)
class Quantised:
    """A quantised matrix, its parts in fp32.

    Args:
        elements: values of `fmt`, `[rows, cols]`.
        scales: one for each block, `[rows / block rows, cols / block cols]`.
        outer: scale of the whole tensor, `[]`, of each row, `[rows, 1]`, or column, `[1, cols]`, or
            of each element, `[rows, cols]`.
        numerator, denominator: `outer` as a quotient. A GEMM's epilogue multiplies by (numerator_a
            * numerator_b) / (denominator_a * denominator_b), which rounds otherwise than outer_a *
            outer_b.
    """

    fmt: FloatFormat
    block: Block
    elements: Float[Tensor, "rows cols"]
    scales: Float[Tensor, "block_rows block_cols"]
    outer: Float[Tensor, "..."]
    numerator: Float[Tensor, "..."]
    denominator: float = 1.0
    scale_format: Literal["e4m3", "e8m0", "fp32"] = "e8m0"

    def scaled(self) -> Float[Tensor, "rows cols"]:
        """Return elements * scales: exact in bf16 wherever `scales` are E4M3 or powers of two."""
        if self.block == TENSOR:
            return self.elements
        blocks = as_blocks(self.elements, self.block) * self.scales[:, None, :, None]
        return blocks.view(self.elements.shape)

    def dequantise(self) -> Float[Tensor, "rows cols"]:
        """Return the values that the quantised matrix stands for, fp32."""
        return self.scaled() * self.outer

    def packed(self) -> tuple[UInt8[Tensor, "rows bytes"], Tensor]:
        """Return the codes of the elements (two of four bits a byte) and scales, or fp32 scales."""
        codes = encode(self.elements, self.fmt)
        codes = pack(codes) if self.fmt in (E2M1, E1M2) else codes
        if self.scale_format == "fp32":
            return codes, self.scales
        e4m3 = self.scale_format == "e4m3"
        return codes, encode(self.scales, E4M3) if e4m3 else encode_e8m0(self.scales)


def check_blocks(x: Float[Tensor, "rows cols"], block: Block) -> None:
    """Refuse sizes that are not multiples of the block's.

    Raises:
        ValueError: names the size, the block and the size to pad to.
    """
    rows, cols = x.shape
    for name, size, part in (("rows", rows, block[0]), ("cols", cols, block[1])):
        if block != TENSOR and size % part:
            raise ValueError(
                f"{name}={size} is not a multiple of the block size {part}; "
                f"pad to {-(-size // part) * part}"
            )


def as_blocks(x: Float[Tensor, "rows cols"], block: Block) -> Float[Tensor, "R r C c"]:
    """Return a view of `x` with dimensions (block row, row, block column, column).

    Raises:
        ValueError: a size is not a multiple of the block's.
    """
    check_blocks(x, block)
    rows, cols = x.shape
    return x.view(rows // block[0], block[0], cols // block[1], block[1])


def pad_to_blocks(
    x: Float[Tensor, "rows cols"], block: Block
) -> Float[Tensor, "padded_rows padded_cols"]:
    """Return `x` padded with zeros, below and to the right, to whole blocks."""
    rows, cols = x.shape
    return torch.nn.functional.pad(x, (0, -cols % block[1], 0, -rows % block[0]))


def quantise_nvfp4(
    x: Float[Tensor, "rows cols"],
    *,
    block: Block = (1, 16),
    fmt: FloatFormat = E2M1,
    amax: Float[Tensor, "..."] | None = None,
    order: ScaleOrder = "te214",
    bits: UInt8[Tensor, "rows cols"] | None = None,
    sr_headroom: float = 1.0,
    four_over_six: Literal["mae", "mse"] | None = None,
    e4m3_max: E4M3Max = 448,
    row_scaled: bool = False,
) -> Quantised:
    """Return `x` as NVFP4: E2M1 elements, E4M3 block scales, an fp32 scale of the tensor.

    Error: with amax_b the largest magnitude of a block, at most amax_b / 6 per element (nearest)
    plus the rounding of its scale (1/16); a block whose scale underflows becomes 0.

    Args:
        fmt: of the elements: E1M2 makes UFP4 of it (arXiv 2606.20381), 7 being its largest.
        amax: the magnitude that the largest scale stands for (None: that of `x`, or of each row or
            column); blocks above it saturate.
        order: of the block scale's products: TransformerEngine >= 2.14, or the paper and TE before.
        bits: for stochastic rounding, see `round_stochastic_e2m1`; None rounds to nearest.
        sr_headroom: factor of the block scales; at 17/16 stochastic rounding does not saturate.
        four_over_six: a block's maximum becomes 4 instead of 6 where its error, absolute (mae) or
            squared (mse), is smaller.
        e4m3_max: the scale of the block with the largest magnitude; at 256 that block too can have
            the 1.5 times larger scale of four over six.
        row_scaled: an outer scale for each row, with blocks of one row; with blocks of one column
            for each column, which is a row of the transposed operand.

    Raises:
        ValueError: a size is not a multiple of the block's.
    """
    x = x.float()
    blocks = as_blocks(x, block)
    peak = blocks.abs().amax(dim=(1, 3), keepdim=True)
    in_rows = block[0] == 1
    if amax is None:
        amax = peak.amax(dim=2 if in_rows else 0, keepdim=True) if row_scaled else peak.amax()
    top = fmt.max * e4m3_max  # the largest element times the largest scale
    enc = quotient(top, amax).clamp(max=_FLT_MAX)
    enc = torch.where((amax == 0) | (enc == 0), 1.0, enc)
    dec = 1.0 / enc
    numerator = torch.where((amax == 0) | amax.isinf(), top, amax)
    if four_over_six:
        choice = _FourOverSix(top, squared=four_over_six == "mse")
        elements, scales = choice(blocks, peak, enc, dec, amax)
    else:
        if order == "te214":
            scales = peak * (enc * x.new_full((), fmt.max).reciprocal())
        else:
            scales = quotient(peak, fmt.max) * enc
        scales = round_nearest((scales * sr_headroom).clamp(max=E4M3.max), E4M3)
        elements = round_elements(blocks, scales, dec, bits, fmt)
    if row_scaled:
        shape = (-1, 1) if in_rows else (1, -1)
        dec, numerator = dec.view(shape), numerator.view(shape)
    return Quantised(
        fmt,
        block,
        elements.view(x.shape),
        scales[:, 0, :, 0],
        dec,
        numerator,
        top,
        "e4m3",
    )


def quantise_mx(
    x: Float[Tensor, "rows cols"],
    *,
    fmt: FloatFormat = E2M1,
    block: Block = (1, 32),
    scale_rounding: str = "rceil",
    bits: UInt8[Tensor, "rows cols"] | None = None,
    sr_headroom: float = 1.0,
    element_headroom: float = 1.0,
) -> Quantised:
    """Return `x` as MXFP4 (`fmt` E2M1) or MXFP8 (E4M3, E5M2): E8M0 scales, see `round_scale`.

    Error: half a step of `fmt` times the block's scale, more where floor or even saturate.

    Args:
        element_headroom: divides the elements before they are rounded, and multiplies the whole; at
            4/3 no element saturates under scales by floor (Tseng et al., arXiv 2502.20586).

    Raises:
        ValueError: a size is not a multiple of the block's, the scale rounding is unknown, or there
            are `bits` and elements are not E2M1.
    """
    x = x.float()
    blocks = as_blocks(x, block)
    peak = blocks.abs().amax(dim=(1, 3), keepdim=True) * sr_headroom
    scales = round_scale(peak, fmt, scale_rounding)
    scaled = torch.where(scales > 0, blocks / scales.clamp(min=2.0**-127), 0.0)
    elements = _round(scaled * (1.0 / element_headroom), fmt, bits)
    outer = torch.full((), element_headroom, device=x.device)
    return Quantised(fmt, block, elements.view(x.shape), scales[:, 0, :, 0], outer, outer)


def quantise_fp8(
    x: Float[Tensor, "rows cols"],
    *,
    fmt: FloatFormat = E4M3,
    block: Block = TENSOR,
    amax: Float[Tensor, ""] | None = None,
    margin: int = 0,
    powers_of_two: bool = True,
) -> Quantised:
    """Return `x` as FP8 with one fp32 scale for the tensor (the default) or one for each block.

    Args:
        amax: of earlier steps, for delayed scaling; elements above it saturate. None: that of `x`.
        margin: delayed scaling leaves a factor 2**margin free.
        powers_of_two: round block scales so, as TransformerEngine; DeepSeek-V3's are fp32.

    Raises:
        ValueError: a size is not a multiple of the block's.
    """
    x = x.float()
    blocks = as_blocks(x, (1, 1) if block == TENSOR else block)
    if block != TENSOR:
        amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    elif amax is None:
        amax = x.abs().amax()
    enc = quotient(fmt.max, amax) / 2.0**margin
    enc = torch.where((amax > 0) & amax.isfinite() & enc.isfinite(), enc, 1.0)
    if block != TENSOR and powers_of_two:
        enc = torch.ldexp(torch.ones_like(enc), torch.frexp(enc)[1] - 1)  # rounded down
    elements = round_nearest(blocks * enc, fmt).view(x.shape)
    if block == TENSOR:
        one = torch.ones(1, 1, device=x.device)
        return Quantised(fmt, TENSOR, elements, one, 1.0 / enc, 1.0 / enc)
    one, scales = torch.ones((), device=x.device), (1.0 / enc)[:, 0, :, 0]
    scale_format: Literal["e8m0", "fp32"] = "e8m0" if powers_of_two else "fp32"
    return Quantised(fmt, block, elements, scales, one, one, scale_format=scale_format)


def round_elements(
    blocks: Float[Tensor, "R r C c"],
    scales: Float[Tensor, "R 1 C 1"],
    outer: Float[Tensor, "..."],
    bits: UInt8[Tensor, "rows cols"] | None,
    fmt: FloatFormat = E2M1,
) -> Float[Tensor, "R r C c"]:
    """Return `blocks` over (scales * outer), rounded to `fmt`; beyond it they saturate."""
    factor = (1.0 / (scales * outer)).clamp(max=_FLT_MAX)
    scaled = (blocks * factor).clamp(-fmt.max, fmt.max)
    return _round(scaled, fmt, bits)


def _round(scaled: Tensor, fmt: FloatFormat, bits: Tensor | None) -> Tensor:
    if bits is None:
        return round_nearest(scaled, fmt)
    if fmt is E1M2:
        return round_stochastic(scaled, bits.view(scaled.shape).float() * (1.0 / 256.0), fmt)
    if fmt is not E2M1:
        raise ValueError(f"stochastic rounding is for elements of four bits, not for {fmt.name}")
    return round_stochastic_e2m1(scaled, bits.view(scaled.shape))


@dataclass(frozen=True)
class _FourOverSix:
    """Chooses the better of two scales for each block; ties go to 6.

    Errors are summed in TransformerEngine's order.

    Args:
        top: the largest scale times the largest element.
    """

    top: float
    squared: bool

    def __call__(
        self, blocks: Tensor, peak: Tensor, enc: Tensor, dec: Tensor, amax: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (elements, scales)."""
        base = quotient(peak, 6.0) * enc
        elements, scales, errors = [], [], []
        for factor in (1.5, 1.0):
            scale = round_nearest((base * factor).clamp(max=E4M3.max), E4M3)
            element = round_elements(blocks, scale, dec, None)
            difference = quotient(element * scale * amax, self.top) - blocks
            each = difference * difference if self.squared else difference.abs()
            elements.append(element)
            scales.append(scale)
            errors.append(_summed(each))
        four = errors[0] < errors[1]
        return (
            torch.where(four, elements[0], elements[1]),
            torch.where(four, scales[0], scales[1]),
        )


def _summed(each: Tensor) -> Tensor:
    """Return the sum of each block: along its columns in order, along its rows by halves."""
    error = each[..., 0]
    for column in range(1, each.shape[3]):
        error = error + each[..., column]
    while error.shape[1] > 1:  # the warp's tree
        half = error.shape[1] // 2
        error = error[:, :half] + error[:, half:]
    return error[..., None]
