"""Softmax attention over torch's fused kernel, with grouped key/value heads, masks and sinks.

Shape legend: batch, seq = queries, ctx = keys, heads, kv = key/value heads, dim = head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kernels.at_least_fp32 import at_least_fp32

_SHORT = 16384  # seq x dim up to which the backward pass on a CPU is faster in fp32 than in bf16


def attention(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv seq dim"],
    v: Float[Tensor, "batch kv seq dim"],
    *,
    scale: float | None = None,
    documents: Int64[Tensor, "batch seq"] | None = None,
    causal: bool = True,
) -> Float[Tensor, "batch heads seq dim"]:
    """Return softmax(scale * q k^T) v, each key/value head serving heads / kv consecutive queries.

    Args:
        scale: 1 / sqrt(dim) where it is None.
        documents: an id for each token; a token attends within its own document only.
        causal: a token attends to none after it.
    """
    grouped = k.shape[1] != q.shape[1]
    if documents is None and causal and _short_on_cpu(q):
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) if grouped else t for t in (k, v))
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
    """Return softmax(scale * q k^T) v over the keys that `mask` lets a query see (None: all).

    Args:
        sink: a logit for each head, one more term exp(sink) of the softmax whose value is 0: weight
            that a head wants to give to no key goes there (gpt-oss, arXiv 2508.10925).
    """
    group = q.shape[1] // k.shape[1]
    if sink is None and mask is not None and group == 1 and _apart_is_faster(q, k, v):
        scaled = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden = (~mask).expand(len(q), 1, 1, -1)
        out: Tensor = _ONE_QUERY_OP(scaled, k, v, hidden)
        return out
    if sink is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1
        )
    weights = attention_weights(q, k, mask, scale=scale, sink=sink)
    return weights.to(v.dtype) @ v.repeat_interleave(group, dim=1)


def _apart_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether two products are faster than the fused kernel: one token in each of some rows.

    On a CPU that kernel multiplies head by head; see tests/bench/one_query.py.
    """
    batch, heads, seq, dim = q.shape
    one = seq == 1 and q.device.type == "cpu" and q.dtype == torch.float32
    learns = q.requires_grad or k.requires_grad or v.requires_grad  # the products have no gradient
    return one and not learns and batch > 2 and batch * heads >= 16 and 32 <= dim <= 96


def _one_query(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1) @ v


# Opaque to torch.compile, whose own loops for a product with a vector take half as long again.
_NAME = "espalier::one_query"
torch.library.define(_NAME, "(Tensor q, Tensor k, Tensor v, Tensor hidden) -> Tensor")
torch.library.impl(_NAME, "CPU", _one_query)
torch.library.register_fake(_NAME, lambda q, k, v, hidden: v.new_empty(*q.shape[:3], v.shape[3]))
_ONE_QUERY_OP = torch.ops.espalier.one_query.default


def attention_weights(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch kv ctx dim"],
    mask: Bool[Tensor, "#batch 1 seq ctx"] | None,
    *,
    scale: float | None = None,
    sink: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads seq ctx"]:
    """Return the weights of `v` in `masked_attention`, fp32; fused kernels do not store them."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = at_least_fp32(q @ k.transpose(-1, -2)) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sink is None:
        return scores.softmax(dim=-1)
    sinks = at_least_fp32(sink)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]


def window_mask(
    queries: Int64[Tensor, "#batch seq"], keys: Int64[Tensor, "#batch ctx"], window: int, sinks: int
) -> Bool[Tensor, "batch seq ctx"]:
    """Return a mask, True where the key is one of the last `window` or of the first `sinks`.

    Args:
        queries, keys: positions of the tokens; a negative one is no key.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    near = distance < window
    return (keys >= 0)[:, None] & (distance >= 0) & (near | (keys < sinks)[:, None])


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
    """Return attention of `q` to the keys of `mask` and of `q_sink` to those of `far`, one softmax.

    StreamingLLM (Xiao et al., arXiv 2309.17453) counts positions inside the cache: a first token in
    the cache is never further away than the cache is long, so its query is rotated by another
    angle.
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
    """Return the weights of `v` in `reindexed_attention`, fp32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = attention_weights(*_each_key_twice(q, q_sink, k, mask, far), scale=scale)
    by_q, by_q_sink = weights.chunk(2, dim=-1)
    return by_q + by_q_sink


def _each_key_twice(
    q: Tensor, q_sink: Tensor, k: Tensor, mask: Tensor, far: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (queries, keys, mask); `q` meets the first copy of a key, `q_sink` the second."""
    zeros = torch.zeros_like(k)
    keys = torch.cat((torch.cat((k, zeros), dim=-1), torch.cat((zeros, k), dim=-1)), dim=2)
    return torch.cat((q, q_sink), dim=-1), keys, torch.cat((mask, far), dim=-1)


def _short_on_cpu(q: Tensor) -> bool:
    bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return bf16 and q.requires_grad and q.shape[2] * q.shape[3] <= _SHORT


class _ShortOnCpu(torch.autograd.Function):
    """torch's fused kernel with a backward pass in fp32, five times as fast at 128 tokens."""

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
        fp32 = [grad.float(), *(t.float() for t in tensors)]
        gradients = fused(*fp32, sums, 0.0, True, scale=ctx.scale)
        return *(t.to(grad.dtype) for t in gradients), None


def span_reach(spans: Int64[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"]:
    """Return the index of the last token that each token sees: the end of its span.

    Args:
        spans: an id for each token, the same along a span; 0 is no span: such a token sees none
            after it.
    """
    seq = spans.shape[1]
    index = torch.arange(seq, device=spans.device)
    ends = torch.ones_like(spans, dtype=torch.bool)
    ends[:, :-1] = spans[:, 1:] != spans[:, :-1]
    next_end = index.where(ends, seq).flip(1).cummin(dim=1).values.flip(1)
    return next_end.where(spans > 0, index)


def document_mask(
    documents: Int64[Tensor, "batch seq"], *, causal: bool = True
) -> Bool[Tensor, "batch seq seq"]:
    """Return mask[b, i, j] = (both tokens are of one document, and j <= i where causal)."""
    same = documents[:, :, None] == documents[:, None, :]
    if not causal:
        return same
    seq = documents.shape[1]
    return same & torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()
