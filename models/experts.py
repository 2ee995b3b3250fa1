"""A mixture of experts as a branch (Shazeer et al., arXiv 1701.06538; Switch, 2101.03961; Mixtral, 2401.04088).

Each token goes to the `top_k` of `num_experts` feed-forward networks that its router scores highest, and takes their
outputs weighted by the router's probabilities. Tokens are sorted by expert, so that each expert is one product.

Shape legend: batch, seq, dim = model width; rows = tokens; k = experts of a token; experts.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kernels.grouped import can_group, grouped_feed_forward
from models.branch import Context, Notes
from models.branch_config import Host
from models.experts_config import ExpertsConfig
from models.layers import FeedForward

_BIAS_GRADIENT = 1e-3  # small beside every other gradient: it must not count in the norm that clips


class Experts(nn.Module):
    """See `ExpertsConfig`. The router is no linear layer to a precision recipe: it stays in fp32."""

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
            scores = F.linear(rows.float(), self.router.float())
        weights, chosen = self._choose(scores)
        counts = torch.zeros(self.cfg.num_experts, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        order = chosen.flatten().argsort(stable=True)  # by expert; within one, by token
        kept = counts
        if self.cfg.capacity_factor is not None and context.noise is not None and _known(counts):
            order, kept = self._drop(order, chosen, counts)
        token = order // self.cfg.top_k
        y = self._experts(rows[token], kept) * weights.flatten()[order, None].to(x.dtype)
        out = torch.zeros_like(rows).index_add(0, token, y.to(rows.dtype))
        if self.shared is not None:
            out = out + self.shared(rows)
        return out.view(x.shape), self._notes(scores, counts, kept)

    def _choose(
        self, scores: Float[Tensor, "rows experts"]
    ) -> tuple[Float[Tensor, "rows k"], Int64[Tensor, "rows k"]]:
        """Return the weights of each token's experts, and which they are."""
        ranked = scores if self.balance is None else scores.softmax(dim=-1) + self.balance.detach()
        chosen = ranked.topk(self.cfg.top_k, dim=-1).indices
        if self.cfg.softmax == "after":
            return scores.gather(1, chosen).softmax(dim=-1), chosen
        weights = scores.softmax(dim=-1).gather(1, chosen)
        if self.cfg.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def _drop(self, order: Tensor, chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is left of `order` and of the counts where an expert takes its capacity."""
        assert self.cfg.capacity_factor is not None
        capacity = max(1, int(self.cfg.capacity_factor * len(order) / self.cfg.num_experts))
        first = counts.cumsum(0) - counts
        rank = torch.arange(len(order), device=order.device) - first[chosen.flatten()[order]]
        return order[rank < capacity], counts.clamp(max=capacity)

    def _experts(
        self, x: Float[Tensor, "rows dim"], counts: Int64[Tensor, " experts"]
    ) -> Float[Tensor, "rows dim"]:
        """Return the outputs of the first counts[0] rows by expert 0, of the next by expert 1, ..."""
        experts = [expert for expert in self.experts if isinstance(expert, FeedForward)]
        if can_group(x, experts[0].down.in_features) and all(_plain(e.up, e.down) for e in experts):
            up, down = (
                torch.stack([w.to(x.dtype) for w in ws])
                for ws in zip(*((e.up.weight, e.down.weight) for e in experts), strict=True)
            )
            return grouped_feed_forward(x, up, down, counts, experts[0].activate)
        sizes = counts.tolist() if _known(counts) else _equal(len(x), len(experts))
        parts = torch.split(x, sizes)  # type: ignore[no-untyped-call]
        # Also an expert without a token takes part: its gradient is zero, not missing.
        return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])

    def _notes(self, scores: Tensor, counts: Tensor, kept: Tensor) -> Notes:
        cfg = self.cfg
        load = counts / counts.sum()
        equal = 1.0 / cfg.num_experts
        notes = {
            "load_entropy": torch.special.entr(load).sum()
            / torch.tensor(float(max(2, cfg.num_experts))).log(),
            "drop_rate": 1.0 - kept.sum() / counts.sum(),
            "max_violation": load.max() / equal - 1.0,
        }
        if cfg.balance == "loss" and cfg.balance_weight:
            mean = scores.softmax(dim=-1).mean(dim=0)
            notes["loss.balance"] = cfg.balance_weight * cfg.num_experts * (load * mean).sum()
        if cfg.z_loss:
            notes["loss.z"] = cfg.z_loss * scores.logsumexp(dim=-1).square().mean()
        if self.balance is not None:
            push = _BIAS_GRADIENT * (self.balance * (load - equal)).sum()
            notes["loss.bias"] = push - push.detach()  # a gradient, no loss
        return notes


def _plain(*linears: nn.Module) -> bool:
    """True where these are products by a weight and nothing else: no recipe quantises them."""
    return all(type(linear) is nn.Linear and linear.bias is None for linear in linears)


def _known(counts: Tensor) -> bool:
    """False where tensors have shapes only: the plan asks what memory a step takes, for which equal shares will do."""
    if torch.compiler.is_compiling():
        return True
    return not (counts.is_meta or isinstance(counts, FakeTensor))


def _equal(rows: int, experts: int) -> list[int]:
    return [rows // experts + (number < rows % experts) for number in range(experts)]
