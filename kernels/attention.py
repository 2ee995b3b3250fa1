"""Softmax attention over torch's fused kernel, with grouped key/value heads and document masks.

Shape legend: batch, seq = queries, ctx = keys, heads, kv = key/value heads, dim = head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_SHORT = 16384  # seq x dim up to which a CPU is faster in fp32 than in bf16, backward


def attention(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv seq dim"],
    v: Float[Tensor, "batch kv seq dim"],
    *,
    scale: float | None = None,
    documents: Int64[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq dim"]:
    """Return causal softmax(scale * q k^T) v; `scale` defaults to 1/sqrt(dim).

    Each key/value head serves heads/kv consecutive query heads. With `documents` (an id for each
    token) a token attends only within its own document.
    """
    grouped = k.shape[1] != q.shape[1]
    if documents is None and _short_on_cpu(q):
        share = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(share, dim=1) if grouped else t for t in (k, v))
        return _ShortOnCpu.apply(q, k, v, scale)  # type: ignore[no-any-return, no-untyped-call]
    if documents is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = document_mask(documents)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def cached_attention(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv ctx dim"],
    v: Float[Tensor, "batch kv ctx dim"],
    mask: Bool[Tensor, "batch 1 seq ctx"] | None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads seq dim"]:
    """Return softmax(scale * q k^T) v of new queries over kept keys; None lets each see all of them."""
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _short_on_cpu(q: Tensor) -> bool:
    bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return bf16 and q.requires_grad and q.shape[2] * q.shape[3] <= _SHORT


class _ShortOnCpu(torch.autograd.Function):
    """torch's fused kernel, its backward pass in fp32: in bf16 that takes five times as long at 128 tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor
        out, sums = fused(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, sums = ctx.saved_tensors
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = fused(grad.float(), *(t.float() for t in tensors), sums, 0.0, True, scale=ctx.scale)
        return *(t.to(grad.dtype) for t in found), None


def document_mask(documents: Int64[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq seq"]:
    """Return mask[b, i, j] = (j <= i and both tokens are of one document)."""
    seq = documents.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, :, None] == documents[:, None, :]) & causal
