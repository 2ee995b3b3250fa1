"""Mamba-2, a state space with one decay for each head (Dao & Gu, arXiv 2405.21060).

    dt = softplus(x W + c);   h_t = exp(-exp(A) dt) h_(t-1) + dt B_t x_t^T;   y_t = C_t h_t + D x_t

All heads share B and C. A short convolution precedes x, B and C; a gated norm follows y.

Shape legend: batch, seq, dim = model width, inner = expand x dim, heads, n = state width.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.at_least_fp32 import at_least_fp32
from kernels.short_conv import short_conv
from models.branch import Context
from models.branch_config import Host
from models.cache import with_history
from models.layers import RMSNorm
from models.linear_attention import recurrence_with_state
from models.mamba_config import MambaConfig


class Mamba(nn.Module):
    """The branch of a `MambaConfig`."""

    filters = ("conv",)

    def __init__(self, cfg: MambaConfig, host: Host, number: int) -> None:
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
        dt = F.softplus(at_least_fp32(step) + self.step_bias).transpose(1, 2)[..., None]
        fade = -self.decay.exp()[:, None, None] * dt
        k = (at_least_fp32(write[:, None]) * dt).expand(-1, self.heads, -1, -1)
        q = at_least_fp32(read[:, None]).expand(-1, self.heads, -1, -1)
        y = recurrence_with_state(context, self.number, q, k, value, fade, None, cfg.chunk)
        y = y + self.skip.to(y.dtype)[:, None, None] * value
        y = y.transpose(1, 2).reshape(batch, seq, inner)
        return self.out(self.norm(y * F.silu(gate)))  # type: ignore[no-any-return]
