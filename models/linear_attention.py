"""Linear attention, whose state does not grow: GLA, DeltaNet with and without a gate, Based.

    gla          S_t = diag(a_t) S + k v^T, a_t = sigmoid(x W1 W2 + b)^(1/16)   (arXiv 2312.06635)
    delta        S_t = (I - b_t k k^T) S + b_t k v^T, |k| = 1, b_t = sigmoid(x W)     (2406.06484)
    gated_delta  as delta, S first times a_t = exp(-exp(A) softplus(x W + c))         (2412.06464)
    based        S_t = S + phi(k) v^T, phi the Taylor expansion of exp to the second order, outputs
                 divided by the same sum over v = 1, as softmax is                    (2402.18668)

All decode by their recurrence; `kernels/recurrence.py` trains them in chunks.

Shape legend: batch, seq, dim = model width, heads, k = key width, v = value width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.at_least_fp32 import at_least_fp32
from kernels.recurrence import recurrence
from kernels.short_conv import short_conv
from models.branch import Context
from models.branch_config import Host
from models.cache import Memory, with_history
from models.layers import RMSNorm
from models.linear_attention_config import LOW_RANK, LinearAttentionConfig

_GATE_ROOT = 16.0  # GLA's gate is a sigmoid to the power 1/16


class LinearAttention(nn.Module):
    """The branch of a `LinearAttentionConfig`."""

    filters = ("conv",)

    def __init__(self, cfg: LinearAttentionConfig, host: Host, number: int) -> None:
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
            self.up = nn.Linear(LOW_RANK, heads * k, bias=True)
        if cfg.kind == "gated_delta":
            # Decays of exp(-0.001) to exp(-0.1) a token, spread over heads.
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
        y = self._recur(q, k, v, parts, context)
        if self.norm is not None:
            gate = parts["gate"].view(batch, seq, self.heads, self.v).transpose(1, 2)
            y = self.norm(y) * F.silu(gate)
        return self.out(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]

    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, parts: dict[str, Tensor], context: Context
    ) -> Float[Tensor, "batch heads seq v"]:
        kind, fade, beta = self.cfg.kind, None, None
        if kind == "based":
            q, k = taylor(q * self.k**-0.25), taylor(k * self.k**-0.25)
            v = F.pad(v, (0, 1), value=1.0)  # the sum that softmax would divide by
        elif kind == "gla":
            q = q * self.k**-0.5
            fade = F.logsigmoid(at_least_fp32(self.up(parts["low"]))) / _GATE_ROOT
            fade = fade.view(*fade.shape[:2], self.heads, self.k).transpose(1, 2)
        else:
            q, k = (F.normalize(at_least_fp32(x), dim=-1) for x in (q, k))
            q = q * self.k**-0.5
            beta = torch.sigmoid(at_least_fp32(parts["beta"])).transpose(1, 2)
        if kind == "gated_delta":
            step = F.softplus(at_least_fp32(parts["fade"]) + self.fade_bias)
            fade = (-self.fade_rate.exp() * step).transpose(1, 2)[..., None]
        y = recurrence_with_state(context, self.number, q, k, v, fade, beta, self.cfg.chunk)
        return y if kind != "based" else y[..., :-1] / y[..., -1:]


def recurrence_with_state(
    context: Context,
    number: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fade: Tensor | None,
    beta: Tensor | None,
    chunk: int,
) -> Tensor:
    """Return the outputs of `kernels.recurrence`, continued from the state of branch `number`.

    Args:
        q, k, v: [batch, heads, seq, width].
        fade: log decay [batch, heads, seq, key width or 1] (None: no decay).
        beta: step size of the delta rule [batch, heads, seq] (None: no delta rule).
        chunk: number of tokens computed at once.
    """
    state = context.state
    if state is None:
        return recurrence(
            q, k, v, log_decay=fade, beta=beta, documents=context.documents, chunk=chunk
        )[0]
    padding = state.padding()
    if padding is not None:  # padding neither fades nor writes, whatever it holds
        hidden = padding[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        fade = None if fade is None else fade.masked_fill(hidden, 0.0)
        beta = None if beta is None else beta.masked_fill(hidden[..., 0], 0.0)
    memory = state.memories.setdefault(number, Memory())
    y, memory["sums"] = recurrence(
        q, k, v, log_decay=fade, beta=beta, state=memory.tensors.get("sums"), chunk=chunk
    )
    return y


def taylor(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows features"]:
    """Return features phi(x) with phi(x) . phi(y) = 1 + x.y + (x.y)^2 / 2."""
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 2**-0.5
    return torch.cat((torch.ones_like(x[..., :1]), x, squares), dim=-1)
