"""The pass over the states of chunks in Triton: `kernels.state_pass`, one launch a pass.

A program keeps its tile of a state in registers from the first chunk to the last. Without the delta
rule elements do not mix, and tiles are small; with it a tile has all k rows of some columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLS = 16, 64  # of a tile, without the delta rule
_ERASED_COLS = 16


def pass_states(
    added: Tensor, decay: Tensor, erase: Tensor | None, first: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """Return (the state that enters each chunk, the state that leaves the last one visited).

    Args:
        backward: from the last chunk to the first, with `erase` transposed.
    """
    batch, heads, chunks, k, v = added.shape
    entering = torch.empty(added.shape, dtype=torch.float32, device=added.device)
    leaving = torch.empty(first.shape, dtype=torch.float32, device=added.device)
    # A row of erase has as many columns: 128 rows fill the chip's memory, 90 kB with two stages.
    rows = _ROWS if erase is None else max(16, triton.next_power_of_2(k))
    cols = min(_COLS, max(16, triton.next_power_of_2(v))) if erase is None else _ERASED_COLS
    _pass[(batch * heads, triton.cdiv(v, cols), triton.cdiv(k, rows))](
        added.contiguous(),
        decay.contiguous(),
        None if erase is None else erase.contiguous(),
        first.contiguous(),
        entering,
        leaving,
        chunks,
        k,
        v,
        decay.shape[-2],
        ROWS=rows,
        COLS=cols,
        BACKWARD=backward,
        ERASES=erase is not None,
        STAGES=2 if rows > 64 else 3,
        num_warps=8 if rows > 64 else 4,
    )
    return entering, leaving


@triton.jit(do_not_specialize=["chunks"])
def _pass(
    added,
    decay,
    erase,
    first,
    entering,
    leaving,
    chunks,
    k,
    v,
    decays,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BACKWARD: tl.constexpr,
    ERASES: tl.constexpr,
    STAGES: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < k) & (col[None, :] < v)
    tile = row[:, None] * v + col[None, :]
    other = tl.arange(0, ROWS)
    square = row[:, None] + other[None, :] * k if BACKWARD else row[:, None] * k + other[None, :]
    state = tl.load(first + matrix * k * v + tile, mask=inside, other=0.0)
    for index in tl.range(0, chunks, num_stages=STAGES):
        place = matrix * chunks + (chunks - 1 - index if BACKWARD else index)
        factor = tl.load(decay + place * decays + row % decays, mask=row < k, other=0.0)
        new = tl.load(added + place * k * v + tile, mask=inside, other=0.0)
        tl.store(entering + place * k * v + tile, state, mask=inside)
        new += factor[:, None] * state
        if ERASES:
            within = (row[:, None] < k) & (other[None, :] < k)
            erased = tl.load(erase + place * k * k + square, mask=within, other=0.0)
            # Three products in TF32: fp32 to 2**-21, without the registers that fp32's would spill.
            new -= tl.dot(erased, state, input_precision="tf32x3")
        state = new
    tl.store(leaving + matrix * k * v + tile, state, mask=inside)
