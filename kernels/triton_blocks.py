"""MXFP4, MXFP8 and FP8 in Triton, bit for bit the references of `kernels.quantise`.

Formats with scales of blocks take one kernel: a program has whole blocks. FP8 with one scale of the
tensor takes the maximum in a pass of its own, unless it is given (delayed scaling).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import FloatFormat
from kernels.philox import Draw
from kernels.quantise import Block, check_blocks
from kernels.triton_nvfp4 import address, amax
from kernels.triton_philox import dice
from kernels.triton_rounding import (
    bf16_bits,
    clip,
    e8m0_byte,
    float8_byte,
    load_tile,
    nearest,
    power_of_two_down,
    power_of_two_up,
    round_bf16,
    stochastic_e2m1,
    store_scales,
    store_tile,
    store_turned,
)

_ROWS, _COLS = 32, 64
_SQUARE = 64  # rows and columns of a tile that is written both ways


def quantise_mx(
    x: Tensor,
    fmt: FloatFormat,
    block: Block,
    rule: str,
    draw: Draw | None = None,
    *,
    headroom: float = 1.0,
    element_headroom: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (elements x block scales in bf16, numerator, scales as E8M0 bytes).

    Bit for bit those of `kernels.quantise.quantise_mx`.

    Args:
        draw: dice of stochastic rounding (E2M1); None rounds to nearest.

    Raises:
        ValueError: a size is not a multiple of the block's, or columns not of 16 with a `draw`.
    """
    return _by_blocks(x, fmt, block, rule, draw, headroom, element_headroom)


def quantise_fp8(
    x: Tensor, fmt: FloatFormat, block: Block, *, powers_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return FP8 with a scale for each block: (values, numerator, scales).

    With powers of two, values are elements x scales in bf16 and scales E8M0 bytes, else values are
    elements and scales fp32.

    Raises:
        ValueError: a size is not a multiple of the block's.
    """
    return _by_blocks(x, fmt, block, "fp8" if powers_of_two else "fp32", None, 1.0, 1.0)


def quantise_fp8_tensor(
    x: Tensor, fmt: FloatFormat, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (FP8 elements in bf16, numerator of the epilogue) under one scale of the tensor.

    Args:
        largest: the magnitude that the scale is made of, None that of `x`.
    """
    largest = amax(x) if largest is None else largest
    out, numerator = _like(x), torch.empty((), dtype=torch.float32, device=x.device)
    _tensor[_grid(x, _ROWS, _COLS)](
        x,
        out,
        numerator,
        largest,
        *x.shape,
        *x.stride(),
        ROWS=_ROWS,
        COLS=_COLS,
        MAX=fmt.max,
        EMIN=fmt.emin,
        MANTISSA=fmt.mantissa,
    )
    return out.view(torch.bfloat16), numerator


def quantise_float8(
    x: Tensor, fmt: FloatFormat, largest: Tensor | None = None, *, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (bytes of `quantise_fp8_tensor`, those of its transpose, numerator).

    Args:
        rows, columns: which of both are wanted; the other is [0, 0].
    """
    largest = amax(x) if largest is None else largest
    along, across = (
        torch.empty(shape if wanted else (0, 0), dtype=torch.uint8, device=x.device)
        for shape, wanted in ((x.shape, rows), (x.T.shape, columns))
    )
    numerator = torch.empty((), dtype=torch.float32, device=x.device)
    _float8[_grid(x, _SQUARE, _SQUARE)](
        x,
        along,
        across,
        numerator,
        largest,
        *x.shape,
        *x.stride(),
        ROWS=_SQUARE,
        COLS=_SQUARE,
        MAX=fmt.max,
        EMIN=fmt.emin,
        MANTISSA=fmt.mantissa,
        ALONG=rows,
        ACROSS=columns,
    )
    return along, across, numerator


def _by_blocks(
    x: Tensor,
    fmt: FloatFormat,
    block: Block,
    rule: str,
    draw: Draw | None,
    headroom: float,
    element_headroom: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_blocks(x, block)
    rows, cols = max(_ROWS, block[0]), max(_COLS, block[1])
    out, numerator = _like(x), torch.empty((), dtype=torch.float32, device=x.device)
    shape = (x.shape[0] // block[0], x.shape[1] // block[1])
    dtype = torch.float32 if rule == "fp32" else torch.uint8
    scales = torch.empty(shape, dtype=dtype, device=x.device)
    _blocks[_grid(x, rows, cols)](
        x,
        *address(draw, x),
        out,
        numerator,
        scales,
        *x.shape,
        *x.stride(),
        headroom,
        element_headroom,
        1.0 / element_headroom,
        1.0 / fmt.max,
        ROWS=rows,
        COLS=cols,
        BLOCK_ROWS=block[0],
        BLOCK_COLS=block[1],
        RULE=rule,
        MAX=fmt.max,
        EMIN=fmt.emin,
        EMAX=fmt.emax,
        MANTISSA=fmt.mantissa,
        STOCHASTIC=draw is not None,
        num_warps=4 if rows * cols <= 4096 else 8,
    )
    return out.view(torch.bfloat16), numerator, scales


def _grid(x: Tensor, rows: int, cols: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], cols)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int16, device=x.device)


@triton.jit
def _fp8_scale(largest, MAX: tl.constexpr):
    """MAX / largest, 1 where that has no finite value."""
    enc = tl.div_rn(MAX, largest)
    usable = (largest > 0.0) & (largest < float("inf")) & (enc < float("inf"))
    return tl.where(usable, enc, 1.0)


@triton.jit
def _fp8_elements(
    value, largest, numerator, MAX: tl.constexpr, EMIN: tl.constexpr, MANTISSA: tl.constexpr
):
    """A tile's elements under the scale of the tensor; one program stores the numerator."""
    enc = _fp8_scale(tl.load(largest), MAX)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(numerator, tl.div_rn(1.0, enc))
    return nearest(clip(value * enc, MAX), EMIN, MANTISSA)


@triton.jit
def _tensor(
    x,
    out,
    numerator,
    largest,
    rows,
    cols,
    stride_row,
    stride_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MAX: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    value = load_tile(x, rows, cols, stride_row, stride_col, ROWS, COLS)
    element = _fp8_elements(value, largest, numerator, MAX, EMIN, MANTISSA)
    store_tile(out, bf16_bits(element), rows, cols, ROWS, COLS)


@triton.jit
def _float8(
    x,
    along,
    across,
    numerator,
    largest,
    rows,
    cols,
    stride_row,
    stride_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    MAX: tl.constexpr,
    EMIN: tl.constexpr,
    MANTISSA: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
):
    value = load_tile(x, rows, cols, stride_row, stride_col, ROWS, COLS)
    element = _fp8_elements(value, largest, numerator, MAX, EMIN, MANTISSA)
    byte = float8_byte(element, EMIN, MANTISSA)
    if ALONG:
        store_tile(along, byte, rows, cols, ROWS, COLS)
    if ACROSS:
        store_turned(across, byte, rows, cols, ROWS, COLS)


@triton.jit
def _mx_scale(peak, of_max, RULE: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr):
    """`kernels.formats.round_scale`."""
    # 2**-127 by its bits: Triton 3.6 takes a subnormal number for fp64.
    least = tl.full((), 1 << 22, tl.int32).to(tl.float32, bitcast=True)
    shrink: tl.constexpr = 1.0 / (1 << EMAX)
    if RULE == "rceil":
        scale = power_of_two_up(peak * of_max)
    elif RULE == "ceil":
        scale = power_of_two_up(peak) * shrink
    elif RULE == "even":
        bits = peak.to(tl.int32, bitcast=True) + (1 << (22 - MANTISSA))
        scale = power_of_two_down(bits.to(tl.float32, bitcast=True)) * shrink
    else:
        scale = power_of_two_down(peak) * shrink
    return tl.where(peak > 0.0, tl.maximum(scale, least), 0.0)


@triton.jit(do_not_specialize=["stream", "tokens", "per_sample"])
def _blocks(
    x,
    samples,
    key,
    stream,
    tokens,
    per_sample,
    out,
    numerator,
    scales,
    rows,
    cols,
    stride_row,
    stride_col,
    headroom,
    element_headroom,
    shrink,
    of_max,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    RULE: tl.constexpr,
    MAX: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    r: tl.constexpr = ROWS // BLOCK_ROWS
    c: tl.constexpr = COLS // BLOCK_COLS
    value = load_tile(x, rows, cols, stride_row, stride_col, ROWS, COLS)
    blocks = tl.reshape(value, (r, BLOCK_ROWS, c, BLOCK_COLS))
    peak = tl.max(tl.max(tl.abs(blocks), axis=3), axis=1)
    has_nan = tl.max(tl.max((blocks != blocks).to(tl.int32), axis=3), axis=1)
    peak = tl.where(has_nan > 0, float("nan"), peak)
    if RULE == "fp8" or RULE == "fp32":
        enc = _fp8_scale(peak, MAX)
        if RULE == "fp8":
            enc = power_of_two_down(enc)
        scale = tl.div_rn(1.0, enc)
        scaled = blocks * enc[:, None, :, None]
    else:
        scale = _mx_scale(peak * headroom, of_max, RULE, EMAX, MANTISSA)
        wide = scale[:, None, :, None]
        scaled = tl.where(wide > 0.0, tl.div_rn(blocks, tl.where(wide > 0.0, wide, 1.0)), 0.0)
        scaled = scaled * shrink
    if STOCHASTIC:
        bits = dice(samples, key, stream, tokens, per_sample, cols, ROWS, COLS)
        element = stochastic_e2m1(scaled, tl.reshape(bits, (r, BLOCK_ROWS, c, BLOCK_COLS)))
    else:
        element = nearest(clip(scaled, MAX), EMIN, MANTISSA)
    if RULE != "fp32":
        element = element * scale[:, None, :, None]
    result = bf16_bits(round_bf16(tl.reshape(element, (ROWS, COLS))))
    store_tile(out, result, rows, cols, ROWS, COLS)
    kept = scale if RULE == "fp32" else e8m0_byte(scale)
    store_scales(scales, kept, rows // BLOCK_ROWS, cols // BLOCK_COLS, r, c)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(numerator, element_headroom)
