"""NVFP4 in Triton, bit for bit the reference: amax in one pass, elements x scales in a second.

`quantise_both` makes from one read of a matrix both of its operands: along its rows and, after a
Hadamard transform if there is one, down its columns. A program takes a tile of 64 columns; a block
is 1 x 16, 16 x 1 or 16 x 16. Random bits are drawn in the kernel that rounds by them. All rounding
is fp32 and integer arithmetic: fp8 and bf16 casts of Triton's interpreter are wrong, and "/" is not
correctly rounded on a GPU, so divisions are `tl.div_rn`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.philox import Draw
from kernels.quantise import Block, check_blocks
from kernels.triton_hadamard import turn
from kernels.triton_philox import dice
from kernels.triton_rounding import (
    bf16_bits,
    e2m1_codes,
    e4m3_byte,
    largest_magnitude,
    load_tile,
    nearest,
    stochastic_e2m1,
    store_scales,
    store_tile,
)

ROWS, COLS = 32, tl.constexpr(64)
_FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)


def amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of a matrix, fp32."""
    return _amaxes(x, None)[0]


def quantise(
    x: Tensor, block: Block, draw: Draw | None = None, *, headroom: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `x` as NVFP4: elements x block scales in bf16, the epilogue's numerator, and scales.

    Scales are E4M3 bytes, one for each block.

    Bit for bit that of `Quantiser(format="nvfp4", block=block, sr_headroom=headroom)`.

    Args:
        draw: dice of stochastic rounding; None rounds to nearest.

    Raises:
        ValueError: a size is not a multiple of the block's, or columns not of 16 with a `draw`.
    """
    check_blocks(x, block)
    dice_of_x = address(draw, x)
    largest, out, numerator = _amaxes(x, None), _like(x), _factor(x)
    scales = _scales(x, block)
    _quantise[_grid(x, ROWS)](
        x,
        *dice_of_x,
        out,
        scales,
        numerator,
        largest,
        *x.shape,
        *x.stride(),
        headroom,
        ROWS=ROWS,
        BLOCK_ROWS=block[0],
        BLOCK_COLS=block[1],
        STOCHASTIC=draw is not None,
    )
    return out.view(torch.bfloat16), numerator, scales


def quantise_both(
    x: Tensor,
    matrix: Tensor | None,
    draws: tuple[Draw, Draw] | None = None,
    *,
    headroom: float = 1.0,
    keep: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return `quantise` of `x` in 1 x 16 blocks, and of its transform in 16 x 1 blocks.

    Args:
        matrix: of `kernels.hadamard`, applied to groups of rows of bf16 `x`; None: no transform.
        draws: dice of both operands.
        keep: return the codes of the second, two a byte, in place of elements x scales.

    Raises:
        ValueError: rows are not a multiple of the matrix's size, or columns not of 16.
    """
    rows = 16 if matrix is None else matrix.shape[0]
    check_blocks(x, (rows, 16))
    one, two = draws or (None, None)
    signs = x if matrix is None else matrix[:, 0].contiguous()
    largest, out, out_turned = _amaxes(x, matrix), _like(x), _codes(x) if keep else _like(x)
    numerator, numerator_turned = _factor(x), _factor(x)
    scales, scales_turned = _scales(x, (1, 16)), _scales(x, (16, 1))
    _quantise_both[_grid(x, rows)](
        x,
        signs,
        *address(one, x),
        *address(two, x)[2:3],
        out,
        out_turned,
        scales,
        scales_turned,
        numerator,
        numerator_turned,
        largest,
        *x.shape,
        *x.stride(),
        headroom,
        ROWS=rows,
        TURN=matrix is not None,
        STOCHASTIC=draws is not None,
        KEEP=keep,
        num_warps=4 if rows <= 32 else 8,  # by the size of the machine code
    )
    return (
        (out.view(torch.bfloat16), numerator, scales),
        (
            out_turned if keep else out_turned.view(torch.bfloat16),
            numerator_turned,
            scales_turned,
        ),
    )


def expand(codes: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Return elements x scales of packed NVFP4 in bf16.

    Args:
        codes: pairs of E2M1, `[rows, cols / 2]`.
        scales: E4M3 bytes, one for each block.
    """
    rows, cols = codes.shape[0], codes.shape[1] * 2
    out = torch.empty(rows, cols, dtype=torch.int16, device=codes.device)
    _expand[_grid(out, ROWS)](
        codes, scales, out, rows, cols, ROWS=ROWS, BLOCK_ROWS=block[0], BLOCK_COLS=block[1]
    )
    return out.view(torch.bfloat16)


def address(draw: Draw | None, x: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """Return what a kernel draws by (samples, key, stream, tokens, tokens of each sample).

    Without a `draw` they have no meaning, `x` standing for the tensors.
    """
    if draw is None:
        return x, x, 0, 0, 1
    if x.shape[1] % 16:
        raise ValueError(f"cols={x.shape[1]} is not a multiple of the 16 elements of a draw")
    samples = draw.dice.samples
    return samples, draw.dice.key, draw.stream, draw.tokens, -(-draw.tokens // len(samples))


def _amaxes(x: Tensor, matrix: Tensor | None) -> Tensor:
    """Return the largest magnitudes of `x` and of its transform (without `matrix`: 0), `[2]`."""
    rows = ROWS if matrix is None else matrix.shape[0]
    largest = torch.zeros(2, dtype=torch.int32, device=x.device)
    _amax[_grid(x, rows)](
        x,
        x if matrix is None else matrix[:, 0].contiguous(),
        largest,
        *x.shape,
        *x.stride(),
        ROWS=rows,
        TURN=matrix is not None,
    )
    return largest.view(torch.float32)


def _grid(x: Tensor, rows: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], COLS.value)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int16, device=x.device)


def _codes(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8, device=x.device)


def _scales(x: Tensor, block: Block) -> Tensor:
    shape = (x.shape[0] // block[0], x.shape[1] // block[1])
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def _factor(x: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=x.device)


@triton.jit
def _amax(
    x, signs, largest, rows, cols, stride_row, stride_col, ROWS: tl.constexpr, TURN: tl.constexpr
):
    value = load_tile(x, rows, cols, stride_row, stride_col, ROWS, COLS)
    # Magnitudes are ordered as their bits are, NaN above inf: their maximum has one value in
    # whatever order programs come.
    tl.atomic_max(largest, largest_magnitude(value).to(tl.int32, bitcast=True), sem="relaxed")
    if TURN:
        turned = largest_magnitude(turn(value, signs, ROWS, COLS)).to(tl.int32, bitcast=True)
        tl.atomic_max(largest + 1, turned, sem="relaxed")


@triton.jit
def _round(
    value,
    bits,
    top,
    headroom,
    out,
    scales,
    rows,
    cols,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Store elements x block scales of a tile, or codes, and the bytes of the scales."""
    r: tl.constexpr = ROWS // BLOCK_ROWS
    c: tl.constexpr = COLS // BLOCK_COLS
    blocks = tl.reshape(value, (r, BLOCK_ROWS, c, BLOCK_COLS))
    peak = tl.max(tl.max(tl.abs(blocks), axis=3), axis=1)
    enc = tl.minimum(tl.div_rn(2688.0, top), _FLT_MAX)
    enc = tl.where((top == 0.0) | (enc == 0.0), 1.0, enc)
    dec = tl.div_rn(1.0, enc)
    scale = peak * (enc * tl.div_rn(1.0, 6.0)) * headroom
    scale = nearest(tl.minimum(scale, 448.0), -6, 3)
    factor = tl.minimum(tl.div_rn(1.0, scale * dec), _FLT_MAX)
    scaled = blocks * factor[:, None, :, None]
    scaled = tl.minimum(tl.maximum(scaled, -6.0), 6.0)
    if STOCHASTIC:
        element = stochastic_e2m1(scaled, tl.reshape(bits, (r, BLOCK_ROWS, c, BLOCK_COLS)))
    else:
        element = nearest(scaled, 0, 1)
    if KEEP:
        codes = e2m1_codes(element, ROWS, COLS)
        store_tile(out, codes, rows, cols // 2, ROWS, COLS // 2)
    else:
        result = tl.reshape(bf16_bits(element * scale[:, None, :, None]), (ROWS, COLS))
        store_tile(out, result, rows, cols, ROWS, COLS)
    store_scales(scales, e4m3_byte(scale), rows // BLOCK_ROWS, cols // BLOCK_COLS, r, c)


@triton.jit
def _store_factor(numerator, top):
    """The numerator of the epilogue, by one of the programs."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(numerator, tl.where((top == 0.0) | (top == float("inf")), 2688.0, top))


@triton.jit(do_not_specialize=["stream", "tokens", "per_sample"])
def _quantise(
    x,
    samples,
    key,
    stream,
    tokens,
    per_sample,
    out,
    scales,
    numerator,
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
    value = load_tile(x, rows, cols, stride_row, stride_col, ROWS, COLS)
    bits, top = value, tl.load(largest)
    if STOCHASTIC:
        bits = dice(samples, key, stream, tokens, per_sample, cols, ROWS, COLS)
    _round(
        value,
        bits,
        top,
        headroom,
        out,
        scales,
        rows,
        cols,
        ROWS,
        BLOCK_ROWS,
        BLOCK_COLS,
        STOCHASTIC,
        False,
    )
    _store_factor(numerator, top)


@triton.jit(do_not_specialize=["stream", "tokens", "per_sample", "stream_turned"])
def _quantise_both(
    x,
    signs,
    samples,
    key,
    stream,
    tokens,
    per_sample,
    stream_turned,
    out,
    out_turned,
    scales,
    scales_turned,
    numerator,
    numerator_turned,
    largest,
    rows,
    cols,
    stride_row,
    stride_col,
    headroom,
    ROWS: tl.constexpr,
    TURN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KEEP: tl.constexpr,
):
    value = load_tile(x, rows, cols, stride_row, stride_col, ROWS, COLS)
    bits, top = value, tl.load(largest)
    if STOCHASTIC:
        bits = dice(samples, key, stream, tokens, per_sample, cols, ROWS, COLS)
    _round(value, bits, top, headroom, out, scales, rows, cols, ROWS, 1, 16, STOCHASTIC, False)
    _store_factor(numerator, top)
    if TURN:
        value, top = turn(value, signs, ROWS, COLS), tl.load(largest + 1)
    if STOCHASTIC:
        bits = dice(samples, key, stream_turned, tokens, per_sample, cols, ROWS, COLS)
    _round(
        value,
        bits,
        top,
        headroom,
        out_turned,
        scales_turned,
        rows,
        cols,
        ROWS,
        16,
        1,
        STOCHASTIC,
        KEEP,
    )
    _store_factor(numerator_turned, top)


@triton.jit
def _expand(
    codes,
    scales,
    out,
    rows,
    cols,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
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
    place = row // BLOCK_ROWS * (cols // BLOCK_COLS) + col // BLOCK_COLS
    e4m3 = tl.load(scales + place, mask=inside, other=0).to(tl.int32)
    # Exponent and mantissa shifted to where fp32 has them: 2**-120 of the value, also of
    # subnormals.
    scale = ((e4m3 & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    tl.store(out + row * cols + col, bf16_bits(element * scale), mask=inside)
