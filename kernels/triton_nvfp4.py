"""NVFP4 in Triton, bit for bit the reference: amax in one pass, elements x scales in a second.

A program takes a tile of 32 x 64 elements; a block is 1 x 16, 16 x 1 or 16 x 16. All rounding is fp32 and
integer arithmetic: fp8 and bf16 casts of Triton's interpreter are wrong, and "/" is not correctly
rounded on a GPU, so divisions are `tl.div_rn`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantise import Block, check_blocks

ROWS, COLS = tl.constexpr(32), tl.constexpr(64)
_FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)


def amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of a matrix, fp32."""
    rows, cols = x.shape
    grid = (triton.cdiv(rows, ROWS.value), triton.cdiv(cols, COLS.value))
    tiles = torch.empty(grid, dtype=torch.float32, device=x.device)
    _amax[grid](x, tiles, rows, cols, x.stride(0), x.stride(1))
    return tiles.amax()


def quantise(x: Tensor, block: Block, bits: Tensor | None = None, *, headroom: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (elements x block scales in bf16, numerator of the epilogue) of `x` as NVFP4.

    The result of `Quantiser(format="nvfp4", block=block, sr_headroom=headroom)`, bit for bit.

    Raises:
        ValueError: a size is not a multiple of the block's.
    """
    check_blocks(x, block)
    rows, cols = x.shape
    largest = amax(x)
    numerator = torch.where((largest == 0) | largest.isinf(), 2688.0, largest)
    out = torch.empty(rows, cols, dtype=torch.int16, device=x.device)
    grid = (triton.cdiv(rows, ROWS.value), triton.cdiv(cols, COLS.value))
    _quantise[grid](
        x, x if bits is None else bits, out, largest, rows, cols, x.stride(0), x.stride(1), headroom,
        BLOCK_ROWS=block[0], BLOCK_COLS=block[1], STOCHASTIC=bits is not None,
    )  # fmt: skip
    return out.view(torch.bfloat16), numerator


@triton.jit
def _amax(x, tiles, rows, cols, stride_row, stride_col):  # type: ignore[no-untyped-def]
    value = _load(x, rows, cols, stride_row, stride_col)
    index = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(tiles + index, tl.max(tl.max(tl.abs(value), axis=1), axis=0))


@triton.jit
def _load(x, rows, cols, stride_row, stride_col):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    place = row[:, None] * stride_row + col[None, :] * stride_col
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _nearest(x, EMIN: tl.constexpr, MANTISSA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round to a format with this smallest exponent and mantissa, ties to even."""
    least: tl.constexpr = (127 + EMIN) << 23
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, least)
    step_bits = power - (MANTISSA << 23)
    step = step_bits.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - step_bits).to(tl.float32, bitcast=True)
    scaled = x * inverse
    # Adding 1.5 * 2**23 leaves no bit behind the point: the sum is rounded to nearest even.
    return ((scaled + 12582912.0) - 12582912.0) * step


@triton.jit
def _e2m1_step(magnitude):  # type: ignore[no-untyped-def]
    return tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))


@triton.jit
def _bf16(x):  # type: ignore[no-untyped-def]
    """The upper half of fp32 numbers that are exact in bf16, as int16."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    x, bits, out, largest, rows, cols, stride_row, stride_col, headroom,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    value = _load(x, rows, cols, stride_row, stride_col)
    r: tl.constexpr = ROWS // BLOCK_ROWS
    c: tl.constexpr = COLS // BLOCK_COLS
    blocks = tl.reshape(value, (r, BLOCK_ROWS, c, BLOCK_COLS))
    peak = tl.max(tl.max(tl.abs(blocks), axis=3), axis=1)
    top = tl.load(largest)
    enc = tl.minimum(tl.div_rn(2688.0, top), _FLT_MAX)
    enc = tl.where((top == 0.0) | (enc == 0.0), 1.0, enc)
    dec = tl.div_rn(1.0, enc)
    scale = peak * (enc * tl.div_rn(1.0, 6.0)) * headroom
    scale = _nearest(tl.minimum(scale, 448.0), -6, 3)
    factor = tl.minimum(tl.div_rn(1.0, scale * dec), _FLT_MAX)
    scaled = blocks * factor[:, None, :, None]
    scaled = tl.minimum(tl.maximum(scaled, -6.0), 6.0)
    if STOCHASTIC:
        dice = tl.reshape(_load(bits, rows, cols, cols, 1), (r, BLOCK_ROWS, c, BLOCK_COLS))
        magnitude = tl.abs(scaled)
        t = magnitude + dice * (1.0 / 256.0) * _e2m1_step(magnitude)
        step = _e2m1_step(t)
        element = tl.minimum(tl.floor(t * tl.div_rn(1.0, step)) * step, 6.0)
        element = tl.where(scaled < 0, -element, element)
    else:
        element = _nearest(scaled, 0, 1)
    result = tl.reshape(_bf16(element * scale[:, None, :, None]), (ROWS, COLS))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    tl.store(out + row[:, None] * cols + col[None, :], result, mask=inside)
