"""Variants of NVFP4 whose outer scale or whose rounding belongs to a group of blocks.

MS-EDEN (Quartet II, arXiv 2601.22813) rounds the elements of a rotated tensor to nearest and makes
up for it on average: the scales of a group are multiplied by what makes its projection on the
original exact, and rounded by dice. Double blocks (TetraJet-v2, arXiv 2510.27527) have an outer
scale in fp32 for each group in place of one for the tensor.

Shape legend: rows, cols of the tensor; block = (1, 16) or, summed over rows, (16, 1); a group is so
many elements in the direction of a block.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kernels.formats import E2M1, E4M3, quotient, round_nearest, round_stochastic
from kernels.quantise import Block, Quantised, as_blocks, round_elements

# Elements reach 6 where a scale that rounds down by 1/16 has 93% of its block below it; scales stay
# one step below 256, so that the correction has room above.
EDEN_ELEMENT = 6.0 / ((17.0 / 16.0) * 0.93)
EDEN_TOP = 255.99 * EDEN_ELEMENT
_DOUBLE_TOP = 2688.0  # 6 * 448
_SMALLEST = 2.0**-9  # E4M3's


def group_block(block: Block, group: int) -> Block:
    """Return (rows, columns) of a group of blocks."""
    return (1, group) if block[0] == 1 else (group, 1)


def quantise_ms_eden(
    x: Float[Tensor, "rows cols"],
    *,
    block: Block,
    group: int,
    bits: UInt8[Tensor, "rows cols"] | None = None,
    amax: Float[Tensor, ""] | None = None,
    as_in_code: bool = False,
) -> Quantised:
    """Return `x`, which a random Hadamard transform of size `group` has rotated, as NVFP4.

    Over dice and signs the mean of the dequantised is `x`: |slope - 1| < 6e-5 on Gaussians. Error:
    that of rounding to nearest and of E4M3 scales; relative squared error .0098 on Gaussians.

    Args:
        group: size of the transform, whose elements share a correction.
        bits: dice of the scales, of which each block reads its first two bytes; None rounds them to
            nearest.
        amax: the magnitude that the scale of the tensor stands for, None that of `x`.
        as_in_code: correct as the authors' code, which weighs each block by 1 / scale**2 (slope
            -5e-4 at 128), not as their paper.

    Raises:
        ValueError: a size is not a multiple of the block's or of the group's.
    """
    x = x.float()
    blocks, wide = as_blocks(x, block), group_block(block, group)
    peak = blocks.abs().amax(dim=(1, 3), keepdim=True)
    amax = peak.amax() if amax is None else amax
    numerator = torch.where((amax == 0) | amax.isinf(), EDEN_TOP, amax)
    outer = quotient(numerator, EDEN_TOP)
    scales = round_nearest((peak / (EDEN_ELEMENT * outer)).clamp(max=E4M3.max), E4M3)
    scales = torch.where(scales == 0, 1.0, scales)
    elements = round_elements(blocks, scales, outer, None)
    factor = torch.ones_like(outer) if as_in_code else outer
    if as_in_code:
        scaled = blocks / (scales * outer)
        exact, rounded = scaled * scaled, scaled * elements
    else:  # elements * scales and products of bf16 are exact, so that the sums alone round
        exact, rounded = blocks * blocks, blocks * (elements * scales)
    correction = _summed(exact, x, wide) / (_summed(rounded, x, wide) * factor)
    correction = torch.where(correction.isfinite() & (correction > 0), correction, 1.0)
    parts = (group // block[0], 1) if block[1] == 1 else (1, group // block[1])
    spread = correction.repeat_interleave(parts[0], 0).repeat_interleave(parts[1], 1)
    scales = (scales[:, 0, :, 0] * spread).clamp(max=E4M3.max)
    scales = round_nearest(scales, E4M3) if bits is None else _drawn(scales, bits, block)
    return Quantised(
        E2M1, block, elements.view(x.shape), scales, outer, numerator, EDEN_TOP, "e4m3"
    )


def quantise_double_block(
    x: Float[Tensor, "rows cols"],
    *,
    block: Block,
    group: int,
    bits: UInt8[Tensor, "rows cols"] | None = None,
    sr_headroom: float = 1.0,
) -> Quantised:
    """Return `x` as NVFP4 with an outer scale for each `group`: amax / 2688.

    A block whose scale would underflow keeps E4M3's smallest. `outer` of the result is spread over
    the elements.

    Args:
        bits, sr_headroom: see `kernels.quantise.quantise_nvfp4`.

    Raises:
        ValueError: a size is not a multiple of the block's or of the group's.
    """
    x = x.float()
    blocks, wide = as_blocks(x, block), group_block(block, group)
    largest = as_blocks(x, wide).abs().amax(dim=(1, 3))
    outer = torch.where((largest == 0) | largest.isinf(), 1.0, quotient(largest, _DOUBLE_TOP))
    spread = outer.repeat_interleave(wide[0], 0).repeat_interleave(wide[1], 1)
    of_block = spread[:: block[0], :: block[1]][:, None, :, None]
    peak = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scales = quotient(peak / of_block, E2M1.max) * sr_headroom
    scales = round_nearest(scales.clamp(max=E4M3.max), E4M3)
    scales = torch.where(scales == 0, _SMALLEST, scales)
    elements = round_elements(blocks, scales, of_block, bits)
    one = torch.ones((), device=x.device)
    return Quantised(
        E2M1, block, elements.view(x.shape), scales[:, 0, :, 0], spread, one, 1.0, "e4m3"
    )


def _summed(each: Tensor, x: Tensor, wide: Block) -> Tensor:
    """Return the sum of each group, in fp64: rounded to fp32 it does not show the order of sums."""
    sums = as_blocks(each.reshape(x.shape).double(), wide).sum(dim=(1, 3))
    return sums.float()


def _drawn(scales: Tensor, bits: Tensor, block: Block) -> Tensor:
    """Return `scales` rounded to E4M3 by 16 bits of each block."""
    drawn = as_blocks(bits.float(), block).transpose(1, 2).flatten(2)
    dice = (drawn[..., 0] + drawn[..., 1] * 256.0 + 0.5) * 2.0**-16
    return round_stochastic(scales, dice, E4M3)
