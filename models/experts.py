"""A mixture of experts (Shazeer et al., arXiv 1701.06538; Switch, 2101.03961; Mixtral, 2401.04088).

The router scores `num_experts` feed-forward networks for each token; the output is the sum of the
`top_k` best, weighted by the router's probabilities. Tokens are sorted by expert, so that each
expert is one product.

Shape legend: batch, seq, dim = model width; rows = tokens; k = experts of a token; experts.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kernels.at_least_fp32 import at_least_fp32
from kernels.grouped import can_group, grouped_feed_forward
from models.branch import Context, Notes
from models.branch_config import Host
from models.experts_config import ExpertsConfig
from models.layers import FeedForward

_BIAS_GRADIENT = 1e-3  # small beside other gradients: clipping by the norm must not see it


class Experts(nn.Module):
    """The branch of an `ExpertsConfig`; its router stays in fp32 under every precision recipe."""

    def __init__(self, cfg: ExpertsConfig, host: Host) -> None:
        super().__init__()
        self.cfg = cfg
        width, hidden = host.width, cfg.width(host)
        self.router = nn.Parameter(torch.empty(cfg.num_experts, width))
        self.balance = nn.Parameter(torch.zeros(cfg.num_experts)) if cfg.balance == "bias" else None
        self.experts = nn.ModuleList(
            FeedForward(width, hidden, host.activation, bias=host.bias)
            for _ in range(cfg.num_experts)
        )
        wide = cfg.shared * hidden
        self.shared = FeedForward(width, wide, host.activation, bias=host.bias) if wide else None

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> tuple[Float[Tensor, "batch seq dim"], Notes]:
        rows = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(at_least_fp32(rows), at_least_fp32(self.router))
        weights, chosen = self._choose(scores)
        counts = torch.zeros(self.cfg.num_experts, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        order = chosen.flatten().argsort(stable=True)  # by expert; within one, by token
        taken = counts
        in_training = context.noise is not None
        if self.cfg.capacity_factor is not None and in_training and _has_values(counts):
            order, taken = self._drop(order, chosen, counts)
        token = order // self.cfg.top_k
        y = self._experts(rows[token], taken) * weights.flatten()[order, None].to(x.dtype)
        out = torch.zeros_like(rows).index_add(0, token, y.to(rows.dtype))
        if self.shared is not None:
            out = out + self.shared(rows)
        return out.view(x.shape), self._notes(scores, counts, taken)

    def _choose(
        self, scores: Float[Tensor, "rows experts"]
    ) -> tuple[Float[Tensor, "rows k"], Int64[Tensor, "rows k"]]:
        """Return (weights, indices) of each token's experts."""
        ranked = scores if self.balance is None else scores.softmax(dim=-1) + self.balance.detach()
        chosen = ranked.topk(self.cfg.top_k, dim=-1).indices
        if self.cfg.softmax == "after":
            return scores.gather(1, chosen).softmax(dim=-1), chosen
        weights = scores.softmax(dim=-1).gather(1, chosen)
        if self.cfg.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def _drop(self, order: Tensor, chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return (`order`, `counts`) without the tokens beyond an expert's capacity."""
        assert self.cfg.capacity_factor is not None
        capacity = max(1, int(self.cfg.capacity_factor * len(order) / self.cfg.num_experts))
        first = counts.cumsum(0) - counts
        rank = torch.arange(len(order), device=order.device) - first[chosen.flatten()[order]]
        return order[rank < capacity], counts.clamp(max=capacity)

    def _experts(
        self, x: Float[Tensor, "rows dim"], counts: Int64[Tensor, " experts"]
    ) -> Float[Tensor, "rows dim"]:
        """Return the outputs of the rows: expert 0 gets the first counts[0], and so on."""
        experts = [expert for expert in self.experts if isinstance(expert, FeedForward)]
        if all(_plain(e.up, e.down) for e in experts) and can_group(x, experts[0].down.in_features):
            up = torch.stack([expert.up.weight.to(x.dtype) for expert in experts])
            down = torch.stack([expert.down.weight.to(x.dtype) for expert in experts])
            return grouped_feed_forward(x, up, down, counts, experts[0].activate)
        sizes = counts.tolist() if _has_values(counts) else _equal_shares(len(x), len(experts))
        parts = torch.split(x, sizes)  # type: ignore[no-untyped-call]
        # An expert without a token is called too: its gradient is zero, not missing.
        return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])

    def _notes(self, scores: Tensor, counts: Tensor, taken: Tensor) -> Notes:
        cfg = self.cfg
        load = counts / counts.sum()
        equal = 1.0 / cfg.num_experts
        most = math.log(max(2, cfg.num_experts))  # entropy of equal load, nats
        notes = {
            "load_entropy": torch.special.entr(load).sum() / most,
            "drop_rate": 1.0 - taken.sum() / counts.sum(),
            "max_violation": load.max() / equal - 1.0,
        }
        if cfg.balance == "loss" and cfg.balance_weight:
            mean = scores.softmax(dim=-1).mean(dim=0)
            notes["loss.balance"] = cfg.balance_weight * cfg.num_experts * (load * mean).sum()
        if cfg.z_loss:
            notes["loss.z"] = cfg.z_loss * scores.logsumexp(dim=-1).square().mean()
        if self.balance is not None:
            push = _BIAS_GRADIENT * (self.balance * (load - equal)).sum()
            notes["loss.bias"] = push - push.detach()  # value 0: only its gradient counts
        return notes


def _plain(*linears: nn.Module) -> bool:
    """Return whether all are nn.Linear without bias, which no recipe quantises."""
    return all(type(linear) is nn.Linear and linear.bias is None for linear in linears)


def _has_values(counts: Tensor) -> bool:
    """Return False for a meta or fake tensor, by which the plan predicts the memory of a step."""
    if torch.compiler.is_compiling():
        return True
    return not (counts.is_meta or isinstance(counts, FakeTensor))


def _equal_shares(rows: int, experts: int) -> list[int]:
    return [rows // experts + (number < rows % experts) for number in range(experts)]
