"""The Hadamard transform in Triton, in the order of sums of `kernels.hadamard`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_rounding import bf16_bits, round_bf16

_TILE = tl.constexpr(64)  # columns, or rows, beside a group


def hadamard(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    """Return bf16 `x`, every group of len(signs) along `dim` transformed.

    Args:
        signs: the first column of `hadamard_matrix`, bf16.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    # Columns of `x` are rows of its transpose, which is a matter of strides.
    source, target = (x, out) if dim == 0 else (x.T, out.T)
    size = len(signs)
    grid = (source.shape[0] // size, triton.cdiv(source.shape[1], _TILE.value))
    strides = (*source.stride(), *target.stride())
    _hadamard[grid](source, signs, target.view(torch.int16), source.shape[1], *strides, SIZE=size)
    return out


@triton.jit
def _hadamard(x, signs, out, cols, stride_row, stride_col, out_row, out_col, SIZE: tl.constexpr):
    row = (tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None]).to(tl.int64)
    col = (tl.program_id(1) * _TILE + tl.arange(0, _TILE)[None, :]).to(tl.int64)
    inside = (row >= 0) & (col < cols)
    value = tl.load(x + row * stride_row + col * stride_col, mask=inside, other=0.0)
    turned = turn(value.to(tl.float32), signs, SIZE, _TILE)
    tl.store(out + row * out_row + col * out_col, bf16_bits(turned), mask=inside)


@triton.jit
def turn(value, signs, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A group of ROWS rows multiplied by H diag(signs) in fp32, rounded to bf16.

    Sums and differences of neighbours, of neighbouring pairs, and so on.
    """
    value = value * tl.load(signs + tl.arange(0, ROWS)).to(tl.float32)[:, None]
    value = _sums(value, ROWS, COLS, 1)
    value = _sums(value, ROWS, COLS, 2)
    value = _sums(value, ROWS, COLS, 4)
    value = _sums(value, ROWS, COLS, 8)
    if ROWS > 16:
        value = _sums(value, ROWS, COLS, 16)
    if ROWS > 32:
        value = _sums(value, ROWS, COLS, 32)
    if ROWS > 64:
        value = _sums(value, ROWS, COLS, 64)
    return round_bf16(value)


@triton.jit
def _sums(value, ROWS: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr):
    """Sums and differences of rows that are HALF apart, in their places."""
    pairs = tl.reshape(value, (ROWS // (2 * HALF), 2, HALF * COLS))
    first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
    both = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(both, (0, 2, 1)), (ROWS, COLS))
