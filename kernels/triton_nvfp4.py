"""NVFP4 in Triton, bit for bit the reference: amax in one pass, elements x scales in a second.

`quantise_both` makes from one read of a gradient both of its operands: along its rows and, after
the Hadamard transform, down its columns. A program takes a tile of 64 columns; a block is 1 x 16,
16 x 1 or 16 x 16. All rounding is fp32 and integer arithmetic: fp8 and bf16 casts of Triton's
interpreter are wrong, and "/" is not correctly rounded on a GPU, so divisions are `tl.div_rn`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantise import Block, check_blocks

ROWS, COLS = 32, tl.constexpr(64)
_FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)


def amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of a matrix, fp32."""
    return _amaxes(x, None)[0]


def quantise(
    x: Tensor, block: Block, bits: Tensor | None = None, *, headroom: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (elements x block scales in bf16, numerator of the epilogue) of `x` as NVFP4.

    Bit for bit that of `Quantiser(format="nvfp4", block=block, sr_headroom=headroom)`.

    Args:
        bits: dice of stochastic rounding, a byte for each element; None rounds to nearest.

    Raises:
        ValueError: a size is not a multiple of the block's.
    """
    check_blocks(x, block)
    largest, out = amax(x), _like(x)
    _quantise[_grid(x, ROWS)](
        x,
        x if bits is None else bits,
        out,
        largest,
        *x.shape,
        *x.stride(),
        headroom,
        ROWS=ROWS,
        BLOCK_ROWS=block[0],
        BLOCK_COLS=block[1],
        STOCHASTIC=bits is not None,
    )
    return out.view(torch.bfloat16), _numerator(largest)


def quantise_both(
    x: Tensor, matrix: Tensor, bits: tuple[Tensor, Tensor] | None = None, *, headroom: float = 1.0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return `quantise` of `x` in 1 x 16 blocks and of its Hadamard transform in 16 x 1 blocks.

    Args:
        matrix: of `kernels.hadamard`, of a size of `kernels.emulate.FUSED_HADAMARD`, applied to
            groups of rows.
        bits: dice of both operands.

    Raises:
        ValueError: rows are not a multiple of the matrix's size, or columns not of 16.
    """
    rows = matrix.shape[0]
    check_blocks(x, (rows, 16))
    largest, largest_turned = _amaxes(x, matrix)
    out, out_turned = _like(x), _like(x)
    _quantise_both[_grid(x, rows)](
        x,
        matrix,
        *(bits or (x, x)),
        out,
        out_turned,
        largest,
        largest_turned,
        *x.shape,
        *x.stride(),
        headroom,
        ROWS=rows,
        STOCHASTIC=bits is not None,
    )
    return (
        (out.view(torch.bfloat16), _numerator(largest)),
        (out_turned.view(torch.bfloat16), _numerator(largest_turned)),
    )


def dequantise(codes: Tensor, scales: Tensor, outer: Tensor) -> Tensor:
    """Return the values of packed NVFP4 in 1 x 16 blocks, fp32.

    Args:
        codes: pairs of E2M1, `[rows, cols / 2]`; scales: E4M3 bytes, `[rows, cols / 16]`.
        outer: the fp32 scale of the tensor, `[]`.
    """
    rows, cols = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(rows, cols, dtype=torch.float32, device=codes.device)
    _dequantise[_grid(out, ROWS)](codes, scales, outer, out, rows, cols, ROWS=ROWS)
    return out


def _amaxes(x: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the largest magnitudes of `x` and, with `matrix`, of its transform."""
    rows = ROWS if matrix is None else matrix.shape[0]
    grid = _grid(x, rows)
    tiles = torch.empty(2, *grid, dtype=torch.float32, device=x.device)
    _amax[grid](
        x,
        x if matrix is None else matrix,
        tiles,
        *x.shape,
        *x.stride(),
        ROWS=rows,
        TURN=matrix is not None,
    )
    return tiles[0].amax(), tiles[1].amax() if matrix is not None else tiles[0].amax()


def _grid(x: Tensor, rows: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], COLS.value)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int16, device=x.device)


def _numerator(largest: Tensor) -> Tensor:
    return torch.where((largest == 0) | largest.isinf(), 2688.0, largest)


@triton.jit
def _amax(
    x, matrix, tiles, rows, cols, stride_row, stride_col, ROWS: tl.constexpr, TURN: tl.constexpr
):
    value = _load(x, rows, cols, stride_row, stride_col, ROWS)
    index = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(tiles + index, _largest(value))
    if TURN:
        index += tl.num_programs(0) * tl.num_programs(1)
        tl.store(tiles + index, _largest(_turn(value, matrix, ROWS)))


@triton.jit
def _largest(value):
    """The largest magnitude; NaN if there is one, which `tl.max` alone would pass over."""
    has_nan = tl.max(tl.max((value != value).to(tl.int32), axis=1), axis=0)
    largest = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    return tl.where(has_nan > 0, float("nan"), largest)


@triton.jit
def _load(x, rows, cols, stride_row, stride_col, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    # 64 bits: a matrix of 2**31 elements has offsets that 32 cannot hold.
    offset = row[:, None].to(tl.int64) * stride_row + col[None, :].to(tl.int64) * stride_col
    return tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(out, value, rows, cols, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    tl.store(out + row[:, None].to(tl.int64) * cols + col[None, :], value, mask=inside)


@triton.jit
def _turn(value, matrix, ROWS: tl.constexpr):
    """matrix.T @ value in fp32, rounded to bf16."""
    line = tl.arange(0, ROWS)
    transposed = tl.load(matrix + line[None, :] * ROWS + line[:, None]).to(tl.float32)
    turned = tl.dot(transposed, value, input_precision="ieee")
    bits = turned.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(turned != turned, turned, rounded.to(tl.float32, bitcast=True))


@triton.jit
def _nearest(x, EMIN: tl.constexpr, MANTISSA: tl.constexpr):
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
def _e2m1_step(magnitude):
    return tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))


@triton.jit
def _bf16(x):
    """The upper half of fp32 numbers that are exact in bf16, as int16."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _rounded(
    value,
    dice,
    largest,
    headroom,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Elements x block scales of a tile."""
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
        magnitude = tl.abs(scaled)
        shift = tl.reshape(dice, (r, BLOCK_ROWS, c, BLOCK_COLS)) * (1.0 / 256.0)
        t = magnitude + shift * _e2m1_step(magnitude)
        step = _e2m1_step(t)
        element = tl.minimum(tl.floor(t * tl.div_rn(1.0, step)) * step, 6.0)
        element = tl.where(scaled < 0, -element, element)
    else:
        element = _nearest(scaled, 0, 1)
    return tl.reshape(_bf16(element * scale[:, None, :, None]), (ROWS, COLS))


@triton.jit
def _quantise(
    x,
    bits,
    out,
    largest,
    rows,
    cols,
    stride_row,
    stride_col,
    headroom,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    value = _load(x, rows, cols, stride_row, stride_col, ROWS)
    dice = _load(bits, rows, cols, cols, 1, ROWS) if STOCHASTIC else value
    result = _rounded(value, dice, largest, headroom, ROWS, BLOCK_ROWS, BLOCK_COLS, STOCHASTIC)
    _store(out, result, rows, cols, ROWS)


@triton.jit
def _quantise_both(
    x,
    matrix,
    bits,
    bits_turned,
    out,
    out_turned,
    largest,
    largest_turned,
    rows,
    cols,
    stride_row,
    stride_col,
    headroom,
    ROWS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    value = _load(x, rows, cols, stride_row, stride_col, ROWS)
    turned = _turn(value, matrix, ROWS)
    dice = _load(bits, rows, cols, cols, 1, ROWS) if STOCHASTIC else value
    _store(out, _rounded(value, dice, largest, headroom, ROWS, 1, 16, STOCHASTIC), rows, cols, ROWS)
    dice = _load(bits_turned, rows, cols, cols, 1, ROWS) if STOCHASTIC else value
    result = _rounded(turned, dice, largest_turned, headroom, ROWS, 16, 1, STOCHASTIC)
    _store(out_turned, result, rows, cols, ROWS)


@triton.jit
def _dequantise(codes, scales, outer, out, rows, cols, ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < cols)
    byte = tl.load(codes + row * (cols // 2) + col // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(col % 2 == 0, byte, byte >> 4)
    exponent, mantissa = (code >> 1) & 3, code & 1
    small = mantissa * 0.5
    large = (1.0 + small) * (1 << (exponent + 1)).to(tl.float32) * 0.25
    magnitude = tl.where(exponent == 0, small, large)
    element = tl.where((code & 8) != 0, -magnitude, magnitude)
    e4m3 = tl.load(scales + row * (cols // 16) + col // 16, mask=inside, other=0).to(tl.int32)
    # Exponent and mantissa shifted to where fp32 has them: 2**-120 of the value, also of
    # subnormals.
    scale = ((e4m3 & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    tl.store(out + row * cols + col, element * scale * tl.load(outer), mask=inside)
