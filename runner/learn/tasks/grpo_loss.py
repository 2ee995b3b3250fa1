"""The loss of GRPO and its relatives, as weights of tokens.

    advantage   of an answer: its reward less the mean of its group; GRPO and DAPO divide it by the
                group's standard deviation (+ 1e-4)
    ratio       r = p(token) now / p(token) when it was drawn
    loss        sum of scale x (-min(r A, clip(r, 1 - low, 1 + high) A) + beta k3)
    k3          e^d - d - 1, d = log p of the reference - log p: an estimate of the KL divergence

    scale       grpo       1 / length of the answer, divided by the number of answers
                dapo       1, divided by the number of tokens of all answers
                dr_grpo    1 / the most tokens of an answer, divided by the number of answers

Sources: GRPO, Shao et al., arXiv 2402.03300; Dr. GRPO, Liu et al., arXiv 2503.20783; DAPO, Yu et
al., arXiv 2503.14476; k3, Schulman, joschu.net/blog/kl-approx.html.

Shape legend: groups, members; rows = tokens of a batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Kind = Literal["grpo", "dr_grpo", "dapo"]
_EPSILON = 1e-4  # keeps a group whose rewards hardly differ from being blown up


def advantages(
    rewards: Float[Tensor, "groups members"], kind: Kind
) -> Float[Tensor, "groups members"]:
    """Return the advantage of each answer over its group."""
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if kind == "dr_grpo":
        return centred
    return centred / (rewards.std(dim=-1, keepdim=True) + _EPSILON)


def scales(
    lengths: Int64[Tensor, " rows"], counted: Bool[Tensor, " rows"], kind: Kind, most: int
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return (scale of each token of an answer, the answer's share of the divisor).

    Args:
        lengths: tokens of each answer that are learnt.
        counted: which answers take part.
        most: the most tokens of an answer.
    """
    size, zero = lengths.clamp(min=1).double(), torch.zeros(())
    if kind == "dapo":
        scale, share = torch.ones_like(size), lengths.double()
    elif kind == "dr_grpo":
        scale, share = torch.full_like(size, 1.0 / most), torch.ones_like(size)
    else:
        scale, share = 1.0 / size, torch.ones_like(size)
    return torch.where(counted, scale, zero), torch.where(counted, share, zero)


@dataclass(frozen=True)
class Surrogate:
    """The loss of the tokens of a batch; its gradient is that of `weights` times their nll.

    Args:
        advantage, scale: of each token; where there is no target the scale is 0.
        sampled: nll of each token when it was drawn, nats.
        reference: under the reference model, nats (None: no KL term).
        low, high: of the clipping.
        beta: coefficient of the KL term.
    """

    advantage: Float[Tensor, " rows"]
    scale: Float[Tensor, " rows"]
    sampled: Float[Tensor, " rows"]
    reference: Float[Tensor, " rows"] | None
    low: float
    high: float
    beta: float

    def weights(
        self, nll: Float[Tensor, " some"], rows: Int64[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """Return d loss / d nll of the tokens `rows`, whose nll is given, without gradient."""
        ratio = (self.sampled[rows] - nll).exp()
        slope = torch.where(self.clipped(nll, rows), 0.0, self.advantage[rows] * ratio)
        if self.reference is not None:
            slope = slope + self.beta * torch.expm1(nll - self.reference[rows])
        return self.scale[rows] * slope

    def clipped(
        self, nll: Float[Tensor, " some"], rows: Int64[Tensor, " some"]
    ) -> Bool[Tensor, " some"]:
        """Return whether the clipping takes the gradient of the tokens `rows` away."""
        ratio, gain = (self.sampled[rows] - nll).exp(), self.advantage[rows]
        return ((gain > 0) & (ratio > 1 + self.high)) | ((gain < 0) & (ratio < 1 - self.low))

    def value(self, nll: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
        """Return the loss, of which `weights` is the slope; not divided yet."""
        ratio = (self.sampled - nll).exp()
        bounded = ratio.clamp(1 - self.low, 1 + self.high)
        loss = -torch.minimum(ratio * self.advantage, bounded * self.advantage)
        if self.reference is not None:
            loss = loss + self.beta * self.divergence(nll)
        return (self.scale * loss).sum()

    def divergence(self, nll: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return k3 of each token."""
        assert self.reference is not None
        gap = nll - self.reference
        return torch.expm1(gap) - gap
