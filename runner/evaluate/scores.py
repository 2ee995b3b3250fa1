"""Scores of texts and of next-token predictions, each a plain function.

Shape legend: tokens, vocab.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_SUBSETS = 2000  # of answers, at most, that a majority is taken over


def normalise(text: str) -> str:
    """Return a text without case, punctuation, articles and double spaces (Rajpurkar et al., SQuAD)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 where the normalised answer is one of the references, else 0."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def f1(answer: str, references: Sequence[str]) -> float:
    """Return the best F1 of words over the references (SQuAD)."""
    return max(_f1(normalise(answer).split(), normalise(r).split()) for r in references)


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:  # nothing to say is right where nothing is to be said
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def rouge(answer: str, reference: str) -> dict[str, float]:
    """Return the F-measures rouge1, rouge2, rougeL (Lin 2004), words stemmed; by the rouge-score package."""
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    found = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    return {name: float(score.fmeasure) for name, score in found.items()}


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that stood there before; NaN where the text has none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else math.nan


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that one of k samples is right, unbiased from `samples` (Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: fewer samples than k.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} needs at least {k} samples; there are {samples}, {correct} of them right"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str | None], truth: str, k: int, seed: int = 0) -> float:
    """Return how often the commonest of k answers is right, over subsets of `answers`: all, or 2,000 drawn.

    None is an answer that could not be parsed: it has no vote. A tie counts as the share of the right one.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs at least {k} answers; there are {len(answers)}")
    if math.comb(len(answers), k) <= _SUBSETS:
        chosen = list(combinations(answers, k))
    else:
        draw = np.random.default_rng(seed)
        chosen = [
            tuple(answers[i] for i in draw.choice(len(answers), k, replace=False))
            for _ in range(_SUBSETS)
        ]
    return sum(_majority(part, truth) for part in chosen) / len(chosen)


def _majority(answers: Sequence[str | None], truth: str) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    leaders = [answer for answer, count in votes.items() if count == most]
    return (truth in leaders) / len(leaders) if leaders else 0.0


def calibration_error(
    confidence: Float[Tensor, " tokens"], correct: Bool[Tensor, " tokens"], bins: int = 15
) -> float:
    """Return the expected calibration error: |accuracy - confidence| over equal bins of confidence (Guo et al. 2017)."""
    place = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, place, correct.double() - confidence.double())
    return float(gap.abs().sum() / len(confidence))


def predictions(
    logits: Float[Tensor, "tokens vocab"], targets: Int64[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Return (probability of the likeliest token, whether it is the target)."""
    confidence, choice = torch.softmax(logits.float(), dim=-1).max(dim=-1)
    return confidence, choice == targets
