"""Softmax attention as a branch: MHA, GQA, MQA; over all tokens or in a sliding window, with sinks.

Shape legend: batch, seq, dim = model width; heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.attention import (
    attention,
    attention_weights,
    document_mask,
    masked_attention,
    reindexed_attention,
    reindexed_weights,
    window_mask,
)
from kernels.rotary import rotate
from models.attention_config import AttentionConfig
from models.branch import Context
from models.branch_config import Host
from models.keys_values import LastKeysValues
from models.layers import RMSNorm
from models.stored_keys_values import keys_values


class Attention(nn.Module):
    """Attention by `AttentionConfig`; q, k and v are one GEMM."""

    def __init__(self, cfg: AttentionConfig, host: Host, number: int) -> None:
        super().__init__()
        self.cfg, self.number, self.causal = cfg, number, host.causal
        self.num_heads, self.num_kv_heads = host.num_heads, cfg.kv_heads(host)
        dim = self.head_dim = host.attention_dim
        # muP scales scores by 1/dim instead of 1/sqrt(dim), equal at head width 64.
        self.scale = 8.0 / dim if host.init == "mup" else dim**-0.5
        width = host.width
        rows, bias = (self.num_heads + 2 * self.num_kv_heads) * dim, host.bias or cfg.qkv_bias
        self.qkv = nn.Linear(width, rows, bias=bias)
        self.out = nn.Linear(self.num_heads * dim, width, bias=host.bias)
        kv = self.num_kv_heads * dim
        self.fused = {"qkv": {"q": self.num_heads * dim, "k": kv, "v": kv}}
        self.q_norm = RMSNorm(dim, host.norm_eps) if host.qk_norm else None
        self.k_norm = RMSNorm(dim, host.norm_eps) if host.qk_norm else None
        self.sink = nn.Parameter(torch.zeros(self.num_heads)) if cfg.learned_sink else None

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq dim"]:
        batch, seq, _ = x.shape
        q, k, v = self._heads(x)
        attend = self._side_by_side if context.parts else self._attend
        y = attend(q, k, v, context)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if self.cfg.window is not None:
            return self._windowed(q, k, v, context)
        q, k = _turn(q, k, context)
        if context.state is not None:
            memory = keys_values(context.state, self.number, k, v)
            k, v, mask = memory.write(context.state, k, v)
            if context.state.row_by_row and mask is not None:
                return self._row_by_row(q, k, v, mask)
            return masked_attention(q, k, v, mask, scale=self.scale, sink=self.sink)
        if context.canvas is not None:
            k, v = context.canvas.exchange(self.number, k, v)
            return masked_attention(q, k, v, None, scale=self.scale, sink=self.sink)
        return self._unbounded(q, k, v, context)

    def _row_by_row(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attend in each row apart, up to the last position that it sees."""
        ctx = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
        ends = (mask.flatten(1, 2).any(dim=1) * ctx).amax(dim=1).tolist()
        rows = [slice(row, row + 1) for row in range(len(q))]
        outputs = [
            masked_attention(
                q[row],
                k[row, :, :end],
                v[row, :, :end],
                mask[row, ..., :end],
                scale=self.scale,
                sink=self.sink,
            )
            for row, end in zip(rows, ends, strict=True)
        ]
        return torch.cat(outputs)

    def _side_by_side(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend within each of the passes that are made together, [1 heads seq dim]."""
        outputs, first = [], 0
        for part in context.parts:
            batch, seq = part.tokens.shape
            last = first + batch * seq
            q_part, k_part, v_part = (
                t[0, :, first:last].reshape(t.shape[1], batch, seq, -1).transpose(0, 1)
                for t in (q, k, v)
            )
            y = self._attend(q_part, k_part, v_part, part)
            outputs.append(y.transpose(0, 1).flatten(1, 2))
            first = last
        return torch.cat(outputs, dim=1)[None]

    def _unbounded(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if self.sink is None and context.reach is None and context.visible is None:
            return attention(
                q, k, v, scale=self.scale, documents=context.documents, causal=self.causal
            )
        positions = context.positions.view(-1, q.shape[2])
        mask = self._mask(positions, positions, context)[:, None]
        return masked_attention(q, k, v, mask, scale=self.scale, sink=self.sink)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend inside the window; the cache keeps no more than window and sinks."""
        cfg, state = self.cfg, context.state
        assert cfg.window is not None
        turned, k = _turn(q, k, context)
        queries = keys = context.positions.view(-1, q.shape[2])
        if state is not None:
            cache = LastKeysValues.of(state, self.number, k, v, cfg.window + cfg.sinks)
            k, v, keys = cache.write(state, k, v, cfg.sinks)
        mask = self._mask(queries, keys, context)
        if not cfg.reindex:
            return masked_attention(turned, k, v, mask[:, None], scale=self.scale, sink=self.sink)
        q_sink, near, far = self._split_sinks(q, mask, queries, keys, context)
        return reindexed_attention(turned, q_sink, k, v, near, far, scale=self.scale)

    def _mask(self, queries: Tensor, keys: Tensor, context: Context) -> Tensor:
        """Return mask[b, i, j], True where query i sees key j, from their positions [b, ...]."""
        cfg, documents = self.cfg, context.documents
        if cfg.window is None:
            of_one = torch.zeros_like(queries) if documents is None else documents
            if context.visible is not None:
                return document_mask(of_one, causal=False) & context.visible
            if context.reach is None:
                return document_mask(of_one, causal=self.causal)
            seen = torch.arange(keys.shape[1], device=keys.device) <= context.reach[..., None]
            return seen & document_mask(of_one, causal=False)
        mask = window_mask(queries, keys, cfg.window, cfg.sinks)
        return mask if documents is None else mask & document_mask(documents)

    def _split_sinks(
        self, q: Tensor, mask: Tensor, queries: Tensor, keys: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (queries for the sinks, mask of the window, mask of the sinks).

        Those queries are turned to their position inside the cache, at most window + sinks - 1.
        """
        assert context.rotary_at is not None
        assert self.cfg.window is not None
        inside = queries.clamp(max=self.cfg.window + self.cfg.sinks - 1)
        near = mask & window_mask(queries, keys, self.cfg.window, 0)
        q_sink = rotate(q, *context.rotary_at(inside[:, None]))
        return q_sink, near[:, None], (mask & ~near)[:, None]

    def _heads(self, x: Float[Tensor, "batch seq dim"]) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def probabilities(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch heads seq seq"]:
        """Return the attention probabilities, which `forward` does not materialise."""
        q, k, _ = self._heads(x)
        turned, k = _turn(q, k, context)
        positions = context.positions.view(-1, x.shape[1])
        mask = self._mask(positions, positions, context)
        if not self.cfg.reindex:
            return attention_weights(turned, k, mask[:, None], scale=self.scale, sink=self.sink)
        q_sink, near, far = self._split_sinks(q, mask, positions, positions, context)
        return reindexed_weights(turned, q_sink, k, near, far, scale=self.scale)


def _turn(q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    if context.rotary is None:
        return q, k
    return rotate(q, *context.rotary), rotate(k, *context.rotary)
