"""Scores of a text and of next-token predictions, each a plain function.

Shape legend: tokens, vocab.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Return the fraction of n-grams that are repeats; NaN if the text has no n-gram."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else math.nan


def calibration_error(
    confidence: Float[Tensor, " tokens"], correct: Bool[Tensor, " tokens"], bins: int = 15
) -> float:
    """Return the expected calibration error over `bins` equal bins of confidence.

    It is the mean of |accuracy - confidence| of the bins, weighted by their tokens (Guo et al.,
    arXiv 1706.04599).
    """
    index = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, index, correct.double() - confidence.double())
    return float(gap.abs().sum() / len(confidence))


def predictions(
    logits: Float[Tensor, "tokens vocab"], targets: Int64[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Return (probability of the most likely token, whether it is the target) for each row."""
    confidence, choice = torch.softmax(logits.float(), dim=-1).max(dim=-1)
    return confidence, choice == targets
