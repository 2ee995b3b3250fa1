"""Softmax attention over torch's fused kernel, with grouped key/value heads and document masks.

Shape legend: batch, seq = queries, ctx = keys, heads, kv = key/value heads, dim = head width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


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
    if documents is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = document_mask(documents)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def document_mask(documents: Int64[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq seq"]:
    """Return mask[b, i, j] = (j <= i and both tokens are of one document)."""
    seq = documents.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, :, None] == documents[:, None, :]) & causal
