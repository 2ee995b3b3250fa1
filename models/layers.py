"""The parts of a decoder: norm, attention, feed-forward. Each holds weights; `kernels` does the work.

Shape legend: batch, seq, dim = model width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kernels.attention import attention, cached_attention
from kernels.packed import can_pack, pack, packed_linear
from kernels.rotary import rotate
from models.cache import KVCache

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu", "relu2"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich, arXiv 1910.07467), in the dtype of `x`."""

    def __init__(self, dim: int, eps: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = 1e-6 if eps is None else eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight (+ bias), in the dtype of `x`."""

    def __init__(self, dim: int, bias: bool, eps: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = 1e-5 if eps is None else eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)


def make_norm(kind: Norm, dim: int, bias: bool, eps: float | None) -> RMSNorm | LayerNorm:
    """Return the norm named `kind`; `bias` applies to LayerNorm only, `eps` None is the kind's default."""
    return RMSNorm(dim, eps) if kind == "rmsnorm" else LayerNorm(dim, bias, eps)


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU; see `kernels.packed`. It holds its weight twice."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.packed = weight, bias, pack(weight)

    def forward(self, x: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows n"]:
        return packed_linear(x, self.weight, self.packed, self.bias)


def pack_linears(module: nn.Module) -> None:
    """Replace every plain linear layer below `module` by its packed form where that works."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            pack_linears(child)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; q, k and v are one GEMM."""

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool,
        qk_norm: bool, scale: float, norm_eps: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = scale
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rotary: tuple[Tensor, Tensor] | None,
        documents: Int64[Tensor, "batch seq"] | None,
        cache: tuple[KVCache, int] | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Attend; with `cache` (and the layer's index in it) also to what was read before."""
        batch, seq, _ = x.shape
        q, k, v = self._heads(x, rotary)
        if cache is None:
            y = attention(q, k, v, scale=self.scale, documents=documents)
        else:
            kept, layer = cache
            y = cached_attention(q, *kept.write(layer, k, v), kept.mask, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]

    def _heads(
        self, x: Float[Tensor, "batch seq dim"], rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v

    def probabilities(
        self, x: Float[Tensor, "batch seq dim"], rotary: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "batch heads seq seq"]:
        """Return how much each token looks at each: what `forward` computes without writing it down."""
        q, k, _ = self._heads(x, rotary)
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(dim=-1)


class FeedForward(nn.Module):
    """SwiGLU (gate and up are one GEMM), GELU (tanh form) or squared ReLU between two linears."""

    def __init__(self, dim: int, hidden: int, activation: Activation, *, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, hidden * (2 if activation == "swiglu" else 1), bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        h = self.up(x)
        if self.activation == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        elif self.activation == "gelu":
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.relu(h).square()
        return self.down(h)  # type: ignore[no-any-return]
