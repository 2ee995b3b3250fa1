"""Attention whose state does not grow: gated linear attention, DeltaNet with and without a gate, Based.

    gla          S_t = diag(a_t) S + k v^T, a_t = sigmoid(x W1 W2 + b)^(1/16)      (arXiv 2312.06635)
    delta        S_t = (I - b_t k k^T) S + b_t k v^T, |k| = 1, b_t = sigmoid(x W)  (arXiv 2406.06484)
    gated_delta  the same with S faded by a_t = exp(-exp(A) softplus(x W + c))     (arXiv 2412.06464)
    based        S_t = S + phi(k) v^T, phi the Taylor expansion of exp to the second order, normalised as softmax is
                 (arXiv 2402.18668)

All decode by their recurrence; `kernels/recurrence.py` trains them in chunks.

Shape legend: batch, seq, dim = model width, heads, k = key width, v = value width.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.recurrence import recurrence, recurrence_flops
from kernels.short_conv import short_conv
from models.branch import Context
from models.cache import Memory, with_history
from models.config import config
from models.flops import linear_flops
from models.layers import RMSNorm

if TYPE_CHECKING:
    from models.decoder import DecoderConfig

_LOW_RANK = 16  # of GLA's gate
_GATE_ROOT = 16.0  # ... which is a sigmoid to the power 1/16


@config
class LinearAttentionConfig:
    """Attention with a state of [heads, key width, value width].

    Args:
        num_heads: None: the decoder's. key_dim: width of a head's keys (None: of the decoder's heads; of `based`
            it should be 8 to 24: phi makes 1 + d + d^2 of it). Values have width / num_heads.
        conv: taps of a short convolution of q, k and v before all else (0: none).
        chunk: tokens computed at once.
    """

    name: ClassVar[str] = "linear"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    kind: Literal["gla", "delta", "gated_delta", "based"] = "gated_delta"
    num_heads: int | None = None
    key_dim: int | None = None
    conv: int = 4
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("num_heads", "key_dim", "chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def shape(self, host: "DecoderConfig") -> tuple[int, int, int]:
        """Return (heads, key width, value width)."""
        heads = self.num_heads or host.num_heads
        if host.width % heads:
            raise ValueError(f"num_heads={heads} must divide width={host.width}")
        return heads, self.key_dim or host.attention_dim, host.width // heads

    def widths(self, host: "DecoderConfig") -> dict[str, int]:
        """Return the parts of the one input projection."""
        heads, k, v = self.shape(host)
        parts = {"q": heads * k, "k": heads * k, "v": heads * v}
        if self.kind != "based":
            parts["gate"] = heads * v
        if self.kind == "gla":
            parts["low"] = _LOW_RANK
        if self.kind in ("delta", "gated_delta"):
            parts["beta"] = heads
        if self.kind == "gated_delta":
            parts["fade"] = heads
        return parts

    def build(self, host: "DecoderConfig", number: int, vocab_size: int) -> "LinearAttention":
        """See `PartConfig`."""
        return LinearAttention(self, host, number)

    def num_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`."""
        heads, k, v = self.shape(host)
        found = host.width * (sum(self.widths(host).values()) + heads * v)
        found += self.conv * heads * (2 * k + v) + (0 if self.kind == "based" else v)
        own = {"gla": heads * k * (_LOW_RANK + 1), "gated_delta": 2 * heads}
        return found + own.get(self.kind, 0)

    def num_active_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: "DecoderConfig", seq: int) -> tuple[int, int]:
        """See `PartConfig`; as chunks are computed, all pairs of a chunk."""
        heads, k, v = self.shape(host)
        found = linear_flops(seq, host.width, sum(self.widths(host).values()))
        found += linear_flops(seq, heads * v, host.width)
        found += linear_flops(seq, _LOW_RANK, heads * k) if self.kind == "gla" else 0
        if self.kind == "based":
            k, v = 1 + k + k * k, v + 1
        found += recurrence_flops(
            seq, heads, k, v, chunk=self.chunk, delta="delta" in self.kind, wide=self.kind == "gla"
        )
        return found, found


class LinearAttention(nn.Module):
    """See `LinearAttentionConfig`."""

    def __init__(self, cfg: LinearAttentionConfig, host: "DecoderConfig", number: int) -> None:
        super().__init__()
        self.cfg, self.number = cfg, number
        heads, k, v = self.heads, self.k, self.v = cfg.shape(host)
        self.widths = cfg.widths(host)
        self.proj = nn.Linear(host.width, sum(self.widths.values()), bias=False)
        self.out = nn.Linear(heads * v, host.width, bias=False)
        self.norm = RMSNorm(v, host.norm_eps) if cfg.kind != "based" else None
        self.conv = None
        self.initial_std: dict[str, float] = {}
        if cfg.conv:
            self.conv = nn.Parameter(torch.empty(heads * (2 * k + v), cfg.conv))
            self.initial_std["conv"] = cfg.conv**-0.5
        if cfg.kind == "gla":
            self.up = nn.Linear(_LOW_RANK, heads * k, bias=True)
        if (
            cfg.kind == "gated_delta"
        ):  # decays of exp(-0.001) to exp(-0.1) a token, spread over heads
            spread = torch.logspace(-3, -1, heads)
            self.fade_rate = nn.Parameter(torch.zeros(heads))
            self.fade_bias = nn.Parameter(spread + torch.log(-torch.expm1(-spread)))

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq dim"]:
        batch, seq, _ = x.shape
        parts = dict(
            zip(self.widths, self.proj(x).split(list(self.widths.values()), dim=-1), strict=True)
        )
        qkv = torch.cat([parts.pop(name) for name in "qkv"], dim=-1)
        if self.conv is not None:
            past = with_history(context.state, self.number, "conv", qkv, self.cfg.conv - 1)
            qkv = F.silu(short_conv(past, self.conv, documents=context.documents))
        sizes = [self.widths[name] for name in "qkv"]
        q, k, v = (
            part.view(batch, seq, self.heads, -1).transpose(1, 2)
            for part in qkv.split(sizes, dim=-1)  # type: ignore[no-untyped-call]
        )  # type: ignore[no-untyped-call]
        y = self._remember(q, k, v, parts, context)
        if self.norm is not None:
            gate = parts["gate"].view(batch, seq, self.heads, self.v).transpose(1, 2)
            y = self.norm(y) * F.silu(gate)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]

    def _remember(
        self, q: Tensor, k: Tensor, v: Tensor, parts: dict[str, Tensor], context: Context
    ) -> Float[Tensor, "batch heads seq v"]:
        kind, fade, beta = self.cfg.kind, None, None
        if kind == "based":
            q, k = taylor(q * self.k**-0.25), taylor(k * self.k**-0.25)
            v = F.pad(v, (0, 1), value=1.0)  # its sum is what softmax divides by
        elif kind == "gla":
            q = q * self.k**-0.5
            fade = F.logsigmoid(self.up(parts["low"]).float()) / _GATE_ROOT
            fade = fade.view(*fade.shape[:2], self.heads, self.k).transpose(1, 2)
        else:
            q, k = F.normalize(q.float(), dim=-1) * self.k**-0.5, F.normalize(k.float(), dim=-1)
            beta = torch.sigmoid(parts["beta"].float()).transpose(1, 2)
        if kind == "gated_delta":
            step = F.softplus(parts["fade"].float() + self.fade_bias)
            fade = (-self.fade_rate.exp() * step).transpose(1, 2)[..., None]
        y = remember(context, self.number, q, k, v, fade, beta, self.cfg.chunk)
        return y if kind != "based" else y[..., :-1] / y[..., -1:]


def remember(
    context: Context, number: int, q: Tensor, k: Tensor, v: Tensor, fade: Tensor | None,
    beta: Tensor | None, chunk: int,
) -> Tensor:  # fmt: skip
    """Return the outputs of a recurrence that goes on where the state of branch `number` left it."""
    state = context.state
    if state is None:
        return recurrence(q, k, v, log_decay=fade, beta=beta, documents=context.documents, chunk=chunk)[0]  # fmt: skip
    unread = state.unread()
    if unread is not None:  # padding neither fades nor writes
        k = k.masked_fill(unread[:, None, :, None], 0.0)
        fade = None if fade is None else fade.masked_fill(unread[:, None, :, None], 0.0)
    kept = state.memories.setdefault(number, Memory())
    y, kept["sums"] = recurrence(q, k, v, log_decay=fade, beta=beta, state=kept.tensors.get("sums"), chunk=chunk)  # fmt: skip
    return y


def taylor(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows features"]:
    """Return phi with phi(x) . phi(y) = 1 + x.y + (x.y)^2 / 2."""
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 2**-0.5
    return torch.cat((torch.ones_like(x[..., :1]), x, squares), dim=-1)
