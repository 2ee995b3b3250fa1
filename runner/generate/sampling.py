"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

Each request draws on the CPU from its own generator: its draws depend neither on the device nor on
the rest of the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_COLDEST = 1e-6  # logits divided by less overflow in fp32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling parameters of one request.

    `top_k`, `top_p` and `min_p` apply after the temperature, in this order.

    Args:
        max_new_tokens: the most tokens to add.
        temperature: divides the logits; 0 is greedy.
        top_k: sample from the k most likely tokens.
        top_p: nucleus sampling: the smallest set of tokens whose probability is at least top_p.
        min_p: drop tokens less than min_p times as likely as the most likely one.
        repetition_penalty: logits of tokens seen before are divided by it where positive,
            multiplied where negative (Keskar et al., arXiv 1909.05858).
        stop: the text ends before the first of these strings.
        seed: seeds the draws of this request.
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
            "temperature": (
                self.temperature,
                self.temperature == 0 or _COLDEST <= self.temperature < math.inf,
                f"0 (greedy) or a number from {_COLDEST:g}",
            ),
            "top_k": (self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p, self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "a number above 0",
            ),
            "seed": (self.seed, 0 <= self.seed < 2**63, "in 0 to 2**63 - 1"),
            "stop": (self.stop, "" not in self.stop, "strings of at least one character"),
        }
        for name, (value, good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name}={value} must be {wanted}")


def choose(
    logits: Float[Tensor, " vocab"],
    seen: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[int, float]:
    """Return the next token and its log-probability (nats) under the unmodified logits.

    Args:
        seen: ids of the prompt and of the text so far, for the repetition penalty.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    scores = logits
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)))
        old = scores[ids]
        penalty = sampling.repetition_penalty
        scores = scores.index_put((ids,), torch.where(old > 0, old / penalty, old * penalty))
    if sampling.temperature == 0:
        choice = int(scores.argmax())
    else:
        weights = probabilities(scores / sampling.temperature, sampling)
        choice = int(torch.multinomial(weights, 1, generator=generator))
    return choice, float(logprobs[choice])


def probabilities(scores: Float[Tensor, " vocab"], sampling: Sampling) -> Float[Tensor, " vocab"]:
    """Return softmax(`scores`) truncated by top-k, top-p and min-p, without renormalising."""
    if sampling.top_k is not None and sampling.top_k < scores.numel():
        floor = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    probs = torch.softmax(scores, dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # the token that crosses top_p is still included
        probs = probs.index_fill(0, order[before >= sampling.top_p], 0.0)
    if sampling.min_p:
        probs = probs.masked_fill(probs < sampling.min_p * probs.max(), 0.0)
    return probs
