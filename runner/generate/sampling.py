"""How the next token is chosen from logits: temperature, top-k, top-p, min-p, repetition, greedy.

Draws are made on the CPU from a generator of the request's own, so they depend neither on the device nor on what
else is in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks for.

    Args:
        temperature: 0 is greedy.
        top_k: only the k likeliest; top_p: only the likeliest that together have this probability; min_p: only
            those at least min_p times as likely as the likeliest. All after the temperature, in this order.
        repetition_penalty: logits of tokens seen before are divided by it where positive, multiplied where
            negative (Keskar et al., arXiv 1909.05858).
        stop: strings at which the text ends; they are not part of it.
        seed: of this request's draws.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 0, "at least 0"),
            "temperature": (self.temperature, self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p, self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            "stop": (self.stop, "" not in self.stop, "strings of at least one character"),
        }
        for name, (value, good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name}={value} must be {wanted}")


def choose(
    logits: Float[Tensor, " vocab"], seen: Sequence[int], how: Sampling, generator: torch.Generator
) -> tuple[int, float]:
    """Return the next token and its log-probability under the untouched logits.

    Args:
        seen: ids of prompt and text so far, for the repetition penalty.
    """
    plain = torch.log_softmax(logits, dim=-1)
    scores = logits
    if how.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)))
        old = scores[ids]
        new = torch.where(old > 0, old / how.repetition_penalty, old * how.repetition_penalty)
        scores = scores.index_put((ids,), new)
    if how.temperature == 0:
        choice = int(scores.argmax())
    else:
        kept = probabilities(scores / how.temperature, how)
        choice = int(torch.multinomial(kept, 1, generator=generator))
    return choice, float(plain[choice])


def probabilities(scores: Float[Tensor, " vocab"], how: Sampling) -> Float[Tensor, " vocab"]:
    """Return what is drawn from: softmax of `scores`, cut by top-k, top-p and min-p, not renormalised."""
    if how.top_k is not None and how.top_k < scores.numel():
        floor = scores.topk(how.top_k).values[-1]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    found = torch.softmax(scores, dim=-1)
    if how.top_p is not None and how.top_p < 1:
        ordered, order = found.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # the one that crosses top_p still counts
        found = found.index_fill(0, order[before >= how.top_p], 0.0)
    if how.min_p:
        found = found.masked_fill(found < how.min_p * found.max(), 0.0)
    return found
