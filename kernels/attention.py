"""Softmax attention over torch's fused kernel, with grouped key/value heads, masks and sinks.

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
    causal: bool = True,
) -> Float[Tensor, "batch heads seq dim"]:
    """Return softmax(scale * q k^T) v, causal or of all pairs; `scale` defaults to 1/sqrt(dim).

    Each key/value head serves heads/kv consecutive query heads. With `documents` (an id for each
    token) a token attends only within its own document.
    """
    grouped = k.shape[1] != q.shape[1]
    if documents is None and causal and _short_on_cpu(q):
        share = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(share, dim=1) if grouped else t for t in (k, v))
        return _ShortOnCpu.apply(q, k, v, scale)  # type: ignore[no-any-return, no-untyped-call]
    if documents is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    mask = document_mask(documents, causal=causal)[:, None]
    return masked_attention(q, k, v, mask, scale=scale)


def masked_attention(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv ctx dim"],
    v: Float[Tensor, "batch kv ctx out"],
    mask: Bool[Tensor, "#batch 1 seq ctx"] | None,
    *,
    scale: float | None = None,
    sink: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads seq out"]:
    """Return softmax(scale * q k^T) v where `mask` lets a query see a key (None: everywhere).

    With `sink`, a logit of each head, the softmax has one more term, exp(sink), of which nothing comes: what a head
    does not want to look at goes there (Agarwal et al., gpt-oss, arXiv 2508.10925).
    """
    share = q.shape[1] // k.shape[1]
    if sink is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=share > 1
        )
    weights = attention_weights(q, k, mask, scale=scale, sink=sink)
    return weights.to(v.dtype) @ v.repeat_interleave(share, dim=1)


def attention_weights(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv ctx dim"],
    mask: Bool[Tensor, "#batch 1 seq ctx"] | None,
    *,
    scale: float | None = None,
    sink: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads seq ctx"]:
    """Return in fp32 what `masked_attention` weighs v by: the fused kernels never write it down."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sink is None:
        return scores.softmax(dim=-1)
    drain = sink.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, drain), dim=-1).softmax(dim=-1)[..., :-1]


def window_mask(
    queries: Int64[Tensor, "#batch seq"], keys: Int64[Tensor, "#batch ctx"], window: int, sinks: int
) -> Bool[Tensor, "batch seq ctx"]:
    """Return True where the key (at its position; negative: none) is one of the last `window` or the first `sinks`."""
    back = queries[:, :, None] - keys[:, None, :]
    near = back < window
    return (keys >= 0)[:, None] & (back >= 0) & (near | (keys < sinks)[:, None])


def reindexed_attention(
    q: Float[Tensor, "batch heads seq dim"],
    q_sink: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv ctx dim"],
    v: Float[Tensor, "batch kv ctx dim"],
    mask: Bool[Tensor, "#batch 1 seq ctx"],
    far: Bool[Tensor, "#batch 1 seq ctx"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads seq dim"]:
    """Return attention in which the keys of `far` are met by `q_sink` and those of `mask` by `q`; the others by none.

    StreamingLLM (Xiao et al., arXiv 2309.17453) counts positions inside the cache: a kept first token is never
    further away than the cache is long, so the query that meets it is turned by another angle.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, mask = _each_key_twice(q, q_sink, k, mask, far)
    return masked_attention(q, k, torch.cat((v, v), dim=2), mask, scale=scale)


def reindexed_weights(
    q: Float[Tensor, "batch heads seq dim"],
    q_sink: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv ctx dim"],
    mask: Bool[Tensor, "#batch 1 seq ctx"],
    far: Bool[Tensor, "#batch 1 seq ctx"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads seq ctx"]:
    """Return what `reindexed_attention` weighs v by."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    near, away = attention_weights(*_each_key_twice(q, q_sink, k, mask, far), scale=scale).chunk(
        2, dim=-1
    )
    return near + away


def _each_key_twice(
    q: Tensor, q_sink: Tensor, k: Tensor, mask: Tensor, far: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and mask: `q` meets the first copy of a key where `mask` says, `q_sink` the second."""
    none = torch.zeros_like(k)
    keys = torch.cat((torch.cat((k, none), dim=-1), torch.cat((none, k), dim=-1)), dim=2)
    return torch.cat((q, q_sink), dim=-1), keys, torch.cat((mask, far), dim=-1)


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


def document_mask(
    documents: Int64[Tensor, "batch seq"], *, causal: bool = True
) -> Bool[Tensor, "batch seq seq"]:
    """Return mask[b, i, j] = (both tokens are of one document, and j <= i where causal)."""
    same = documents[:, :, None] == documents[:, None, :]
    if not causal:
        return same
    seq = documents.shape[1]
    return same & torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()
