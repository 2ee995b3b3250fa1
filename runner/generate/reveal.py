"""Which masked tokens a step of denoising reveals, and what it puts there.

Shape legend: masked = masked tokens of the current block of one text, revealed = its others, vocab.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kernels.philox import gumbel
from runner.generate.choosing import truncate
from runner.generate.denoising import MAX_PLACES, MAX_STEPS, Denoising

_LEAST_TIME = 1e-3  # the time after the last step, of Dream's schedule


@dataclass(frozen=True)
class Turn:
    """Where a text stands in its block.

    Args:
        number: the step, counted over the whole text.
        step, steps: the step within the block, and how many there are.
        masked_first: so many tokens of the block were masked at its first step.
    """

    number: int
    step: int
    steps: int
    masked_first: int

    @property
    def is_last(self) -> bool:
        """Whether all that is masked must be revealed now."""
        return self.step + 1 >= self.steps

    def times(self) -> tuple[float, float]:
        """Return the times before and after the step, from 1 on: the parts that are masked."""
        times = torch.linspace(1.0, _LEAST_TIME, self.steps + 1, dtype=torch.float64)
        return float(times[self.step]), float(times[self.step + 1])

    def share(self) -> float:
        """Return the part of the masked tokens that the time passed asks for."""
        before, after = self.times()
        return 1.0 - after / before

    def remasked(self, most: float) -> float:
        """Return the part of the revealed tokens that the step masks again, at most `most`."""
        before, after = self.times()
        return min(most, after / (1.0 - before)) if before < 1.0 and not self.is_last else 0.0

    def share_beside(self, remasked: float) -> float:
        """Return `share` where a part `remasked` of the revealed tokens is masked again."""
        before, after = self.times()
        return (1.0 - after - (1.0 - remasked) * (1.0 - before)) / before


def choose_tokens(
    how: Denoising,
    logits: Float[Tensor, "masked vocab"],
    places: Int64[Tensor, " masked"],
    turn: Turn,
) -> tuple[Int64[Tensor, " masked"], Float[Tensor, " masked"]]:
    """Return the token of each place and its confidence, larger meaning surer.

    Args:
        places: the index of each token in its text.
    """
    cut = replace(how, temperature=how.temperature or 1.0)
    scores = truncate(logits.clone(), [cut] * len(logits))
    tempered = scores / how.temperature if how.temperature else scores
    noisy = tempered
    if how.temperature:
        noisy = tempered + _noise(how, places, turn.number, logits.shape[1])
    tokens = noisy.argmax(dim=-1)
    probs = torch.softmax(tempered.double(), dim=-1)
    if how.algorithm == "topk_margin":
        best = probs.topk(min(2, probs.shape[1]), dim=-1).values
        confidence = best[:, 0] - (best[:, 1] if best.shape[1] > 1 else 0.0)
    elif how.algorithm == "entropy":
        confidence = torch.special.xlogy(probs, probs).sum(dim=-1)
    elif how.algorithm == "low_confidence":
        unmodified = torch.softmax(logits.double(), dim=-1)
        confidence = unmodified.gather(1, tokens[:, None])[:, 0]
    else:
        confidence = probs.gather(1, tokens[:, None])[:, 0]
    return tokens, confidence


def choose_places(
    how: Denoising,
    confidence: Float[Tensor, " masked"],
    places: Int64[Tensor, " masked"],
    turn: Turn,
) -> Bool[Tensor, " masked"]:
    """Return which of the masked tokens are revealed in this step; at the last one all are."""
    number = len(confidence)
    if how.threshold is not None:
        return (confidence >= how.threshold) | (torch.arange(number) == confidence.argmax())
    if turn.is_last:
        return torch.ones(number, dtype=torch.bool)
    every = int(places.max()) + 1
    noise = _noise(how, places.new_tensor([MAX_PLACES]), turn.number, every)[0][places]
    if how.algorithm == "origin":
        return _uniform(noise) < turn.share_beside(turn.remasked(how.remask))
    if how.algorithm in ("low_confidence", "random"):
        each, more = divmod(turn.masked_first, turn.steps)
        count = each + (turn.step < more)
    else:
        count = int(number * turn.share())
    if how.algorithm == "random":
        confidence = noise
    elif how.order_temperature:
        confidence = confidence / how.order_temperature + noise
    chosen = torch.zeros(number, dtype=torch.bool)
    chosen[confidence.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def choose_remasked(
    how: Denoising, revealed: Int64[Tensor, " revealed"], turn: Turn
) -> Bool[Tensor, " revealed"]:
    """Return which of the tokens revealed before this step it masks again.

    Args:
        revealed: the index of each in its text.
    """
    part = turn.remasked(how.remask)
    if not part or not len(revealed):
        return torch.zeros(len(revealed), dtype=torch.bool)
    every = int(revealed.max()) + 1
    at = revealed.new_tensor([MAX_PLACES])
    return _uniform(_noise(how, at, MAX_STEPS + turn.number, every)[0][revealed]) < part


def _uniform(gumbel_noise: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the uniform variables exp(-exp(-g)) of Gumbel variables g."""
    return torch.exp(-torch.exp(-gumbel_noise.double()))


def _noise(
    how: Denoising, places: Int64[Tensor, " masked"], step: int, n: int
) -> Float[Tensor, "masked n"]:
    """Return `n` Gumbel variables for each place in a step."""
    keys = places.new_tensor([[how.seed, how.sample]]).expand(len(places), 2)
    return gumbel(keys[:, 0], keys[:, 1], step * (MAX_PLACES + 1) + places, n)
