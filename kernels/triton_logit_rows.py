"""Rows of logits in Triton, a program each: `kernels.logit_rows`.

A row is read once for its maximum and the sum beside it, each lane keeping its own, and once more
for its gradient, which is written where the logits were: 6 bytes a logit in bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLS = 4096  # read at once


def nll(logits: Tensor, targets: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Return (negative log-likelihood, logsumexp) of each row, fp32.

    Args:
        softcap: 0 for none.
    """
    rows, vocab = logits.shape
    found, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    _nll[(rows,)](
        logits,
        targets,
        found,
        lse,
        vocab,
        logits.stride(0),
        scale,
        softcap,
        COLS=_columns(vocab),
        CAPPED=softcap > 0.0,
        num_warps=8,
    )
    return found, lse


def gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    factors: Tensor,
    at_target: Tensor,
    scale: float,
    softcap: float,
) -> None:
    """Write softmax * factors - at_target * [column is the target], times the cap's slope."""
    rows, vocab = logits.shape
    _gradient[(rows,)](
        logits,
        targets,
        lse,
        factors,
        at_target,
        vocab,
        logits.stride(0),
        scale,
        softcap,
        COLS=_columns(vocab),
        CAPPED=softcap > 0.0,
        num_warps=8,
    )


def _columns(vocab: int) -> int:
    return int(min(_COLS, max(16, triton.next_power_of_2(vocab))))


@triton.jit
def _tanh(x):
    # To 1e-7; exp may become inf, whose quotient is 0.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _shown(logit, scale, softcap, CAPPED: tl.constexpr):
    value = logit.to(tl.float32) * scale
    if CAPPED:
        value = softcap * _tanh(value / softcap)
    return value


@triton.jit
def _nll(
    logits,
    targets,
    found,
    sums,
    vocab,
    stride,
    scale,
    softcap,
    COLS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    peak = tl.full((COLS,), -3.0e38, tl.float32)
    total = tl.zeros((COLS,), tl.float32)
    for first in range(0, vocab, COLS):
        col = first + tl.arange(0, COLS)
        inside = col < vocab
        value = _shown(tl.load(start + col, mask=inside, other=0.0), scale, softcap, CAPPED)
        value = tl.where(inside, value, -float("inf"))
        above = tl.maximum(peak, value)
        total = total * tl.exp(peak - above) + tl.exp(value - above)
        peak = above
    largest = tl.max(peak, axis=0)
    lse = largest + tl.log(tl.sum(total * tl.exp(peak - largest), axis=0))
    target = tl.load(targets + row)
    counted = target >= 0
    picked = _shown(tl.load(start + target, mask=counted, other=0.0), scale, softcap, CAPPED)
    tl.store(found + row, tl.where(counted, lse - picked, 0.0))
    tl.store(sums + row, lse)


@triton.jit
def _gradient(
    logits,
    targets,
    sums,
    factors,
    at_target,
    vocab,
    stride,
    scale,
    softcap,
    COLS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    target, lse = tl.load(targets + row), tl.load(sums + row)
    factor, here = tl.load(factors + row), tl.load(at_target + row)
    for first in range(0, vocab, COLS):
        col = first + tl.arange(0, COLS)
        inside = col < vocab
        value = _shown(tl.load(start + col, mask=inside, other=0.0), scale, softcap, CAPPED)
        # Without its factor a row may be all inf: 0 times NaN would stay.
        share = tl.where(factor == 0.0, 0.0, tl.exp(value - lse) * factor)
        share = share - tl.where(col == target, here, 0.0)
        if CAPPED:
            share = share * (1.0 - (value / softcap) * (value / softcap))
        tl.store(start + col, share.to(logits.dtype.element_ty), mask=inside)
