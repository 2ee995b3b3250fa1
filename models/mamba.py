"""Mamba-2, a state space with one decay for each head (Dao & Gu, arXiv 2405.21060).

    dt = softplus(x W + c);   h_t = exp(-exp(A) dt) h_(t-1) + dt B_t x_t^T;   y_t = C_t h_t + D x_t

B and C are shared by all heads; x, B and C pass a short convolution first, y a gated norm after.

Shape legend: batch, seq, dim = model width, inner = expand x dim, heads, n = state width.
"""

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.recurrence import recurrence_flops
from kernels.short_conv import short_conv
from models.branch import Context
from models.cache import with_history
from models.config import config
from models.flops import linear_flops
from models.layers import RMSNorm
from models.linear_attention import remember

if TYPE_CHECKING:
    from models.decoder import DecoderConfig


@config
class MambaConfig:
    """A Mamba-2 mixer.

    Args:
        state_dim: n. head_dim: width of a head (None: of the decoder's heads). expand: inner width over the model's. conv: taps.
        chunk: tokens computed at once.
    """

    name: ClassVar[str] = "mamba"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    state_dim: int = 64
    head_dim: int | None = None
    expand: int = 2
    conv: int = 4
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("state_dim", "head_dim", "expand", "conv", "chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def shape(self, host: "DecoderConfig") -> tuple[int, int]:
        """Return (inner width, heads)."""
        inner, head = self.expand * host.width, self.head_dim or host.attention_dim
        if inner % head:
            raise ValueError(f"head_dim={head} must divide expand x width = {inner}")
        return inner, inner // head

    def build(self, host: "DecoderConfig", number: int, vocab_size: int) -> "Mamba":
        """See `PartConfig`."""
        return Mamba(self, host, number)

    def num_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`."""
        inner, heads = self.shape(host)
        mixed = inner + 2 * self.state_dim
        return host.width * (2 * inner + 2 * self.state_dim + heads) + (self.conv + 1) * mixed + 3 * heads + inner + inner * host.width  # fmt: skip

    def num_active_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: "DecoderConfig", seq: int) -> tuple[int, int]:
        """See `PartConfig`; as chunks are computed, all pairs of a chunk."""
        inner, heads = self.shape(host)
        found = linear_flops(seq, host.width, 2 * inner + 2 * self.state_dim + heads)
        found += linear_flops(seq, inner, host.width)
        found += recurrence_flops(seq, heads, self.state_dim, inner // heads, chunk=self.chunk, delta=False, wide=False)  # fmt: skip
        return found, found


class Mamba(nn.Module):
    """See `MambaConfig`."""

    def __init__(self, cfg: MambaConfig, host: "DecoderConfig", number: int) -> None:
        super().__init__()
        self.cfg, self.number = cfg, number
        inner, heads = self.inner, self.heads = cfg.shape(host)
        mixed = inner + 2 * cfg.state_dim
        self.proj = nn.Linear(host.width, inner + mixed + heads, bias=False)
        self.conv = nn.Parameter(torch.empty(mixed, cfg.conv))
        self.conv_bias = nn.Parameter(torch.zeros(mixed))
        self.initial_std = {"conv": cfg.conv**-0.5}
        # Steps from 0.001 to 0.1 and decays from 1 to 16, spread over heads instead of drawn.
        steps = torch.logspace(-3, -1, heads)
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.decay = nn.Parameter(torch.linspace(0.0, math.log(16.0), heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, host.norm_eps)
        self.out = nn.Linear(inner, host.width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq dim"]:
        cfg, (batch, seq, _) = self.cfg, x.shape
        n, inner = cfg.state_dim, self.inner
        gate, mixed, step = self.proj(x).split((inner, inner + 2 * n, self.heads), dim=-1)
        past = with_history(context.state, self.number, "conv", mixed, cfg.conv - 1)
        mixed = short_conv(past, self.conv, documents=context.documents)
        mixed = F.silu(mixed + self.conv_bias.to(mixed.dtype))
        value, write, read = mixed.split((inner, n, n), dim=-1)  # type: ignore[no-untyped-call]
        value = value.view(batch, seq, self.heads, -1).transpose(1, 2)
        dt = F.softplus(step.float() + self.step_bias).transpose(1, 2)[..., None]
        fade = -self.decay.exp()[:, None, None] * dt
        k = (write[:, None].float() * dt).expand(-1, self.heads, -1, -1)
        q = read[:, None].float().expand(-1, self.heads, -1, -1)
        y = remember(context, self.number, q, k, value, fade, None, cfg.chunk)
        y = y + self.skip.to(y.dtype)[:, None, None] * value
        y = y.transpose(1, 2).reshape(batch, seq, inner)
        return self.out(self.norm(y * F.silu(gate)))  # type: ignore[no-any-return]
