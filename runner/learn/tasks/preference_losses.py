"""Losses of pairs of answers, and their slopes by the log-probability of each answer.

h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), over the sums of an
answer's tokens, or over their means where a loss is normalised by length.

    dpo              -log sigmoid(beta h)                            (Rafailov et al., 2305.18290)
    dpo_normalised   the same over means
    hinge            max(0, 1 - beta h)                                  (Zhao et al., 2305.10425)
    ipo              (h - 1 / (2 beta))^2                                (Azar et al., 2310.12036)
    ipo_normalised   the same over means, as in TRL
    simpo            -log sigmoid(beta h - gamma), means, ref = 0        (Meng et al., 2405.14734)
    orpo             nll(chosen) - weight x log sigmoid(log odds ratio)  (Hong et al., 2403.07691)
                     of the means
    kto              mean of 1 - sigmoid(beta (r - kl)) of the chosen    (Ethayarajh et al.,
                     and 1 - sigmoid(beta (kl - r)) of the rejected       2402.01306)
                     answer, r = log pi - log ref

Shape legend: pairs; the last axis of 2 is (chosen, rejected).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from runner.learn.tasks.preference_config import PreferenceConfig

_LEAST = 1e-7  # of -log p: odds of a certain answer are infinite


@dataclass(frozen=True)
class Pairs:
    """What is known of pairs of answers, nats, without gradient.

    Args:
        logp: of each answer under the policy, summed over its tokens.
        reference: the same under the reference; 0 where the loss has none.
        lengths: number of tokens summed.
        kl: of KTO, at least 0.
    """

    logp: Float[Tensor, "pairs 2"]
    reference: Float[Tensor, "pairs 2"]
    lengths: Float[Tensor, "pairs 2"]
    kl: float | Float[Tensor, ""] = 0.0

    def scale(self, *, normalised: bool) -> Float[Tensor, "pairs 2"]:
        """Return what sums are multiplied with: 1 / length, or 1."""
        return 1.0 / self.lengths if normalised else torch.ones_like(self.lengths)

    def ratios(self, *, normalised: bool) -> Float[Tensor, "pairs 2"]:
        """Return log pi - log ref of each answer, of a token on average if `normalised`."""
        return (self.logp - self.reference) * self.scale(normalised=normalised)


Loss = Float[Tensor, " pairs"]
Slopes = Float[Tensor, "pairs 2"]


def pair_losses(cfg: PreferenceConfig, pairs: Pairs) -> tuple[Loss, Slopes]:
    """Return (the loss of each pair, its derivative by the log-probability of each answer)."""
    if cfg.loss == "orpo":
        return _orpo(cfg, pairs)
    if cfg.loss == "kto":
        return _kto(cfg, pairs)
    ratios = pairs.ratios(normalised=cfg.normalised)
    loss, slope = _OF_DIFFERENCE[cfg.kind](cfg, ratios[:, 0] - ratios[:, 1])
    signs = torch.tensor([1.0, -1.0], dtype=slope.dtype, device=slope.device)
    return loss, slope[:, None] * signs * pairs.scale(normalised=cfg.normalised)


def _logistic(cfg: PreferenceConfig, h: Tensor) -> tuple[Tensor, Tensor]:
    z = cfg.beta * h - (cfg.gamma if cfg.loss == "simpo" else 0.0)
    return softplus(-z), -cfg.beta * torch.sigmoid(-z)


def _hinge(cfg: PreferenceConfig, h: Tensor) -> tuple[Tensor, Tensor]:
    missing = 1.0 - cfg.beta * h
    return missing.clamp(min=0.0), -cfg.beta * (missing > 0).to(h.dtype)


def _square(cfg: PreferenceConfig, h: Tensor) -> tuple[Tensor, Tensor]:
    missing = h - 1.0 / (2.0 * cfg.beta)
    return missing.square(), 2.0 * missing


_OF_DIFFERENCE: dict[str, Callable[[PreferenceConfig, Tensor], tuple[Tensor, Tensor]]] = {
    "dpo": _logistic,
    "simpo": _logistic,
    "hinge": _hinge,
    "ipo": _square,
}


def _orpo(cfg: PreferenceConfig, pairs: Pairs) -> tuple[Loss, Slopes]:
    mean = pairs.logp / pairs.lengths
    certain = mean > -_LEAST
    inside = mean.clamp(max=-_LEAST)
    odds = inside - _log1mexp(inside)
    z = odds[:, 0] - odds[:, 1]
    slope = -cfg.odds_weight * torch.sigmoid(-z)
    by_mean = (-1.0 / torch.expm1(inside)).masked_fill(certain, 0.0)  # of the odds
    chosen = slope * by_mean[:, 0] - 1.0
    slopes = torch.stack((chosen, -slope * by_mean[:, 1]), dim=1) / pairs.lengths
    return cfg.odds_weight * softplus(-z) - mean[:, 0], slopes


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x < 0 without cancellation (Maechler, 2012)."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _kto(cfg: PreferenceConfig, pairs: Pairs) -> tuple[Loss, Slopes]:
    ratios = pairs.ratios(normalised=False)
    signs = torch.tensor([1.0, -1.0], dtype=ratios.dtype, device=ratios.device)
    weights = torch.tensor([cfg.desirable, cfg.undesirable]).to(ratios)
    value = torch.sigmoid(signs * cfg.beta * (ratios - pairs.kl))
    losses = weights * (1.0 - value)
    slopes = -weights * signs * cfg.beta * value * (1.0 - value)
    return losses.mean(dim=1), 0.5 * slopes
