"""What several answers to a question are worth: pass@k, votes, the best by a score, gating.

An N-curve is the expectation over which k of the n answers are looked at, not over one draw of k.

Shape legend: n = answers to a question, in the order in which they were drawn.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

_SUBSETS = 64  # of which the expectation of a vote is taken, where there are more


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the probability that one of k of n answers is right: 1 - C(n - right, k) / C(n, k).

    Raises:
        ValueError: k is not in 1..n.
    """
    _check_k(k, n)
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer, of several the first; None votes for nobody."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=lambda answer: votes[answer]) if votes else None


def majority_at_k(answers: Sequence[str | None], reference: str, k: int) -> float:
    """Return the share of subsets of k answers, in their order, whose majority is right.

    Of more than 64 subsets it takes as many, the same for every question.

    Raises:
        ValueError: k is not in 1..n.
    """
    _check_k(k, len(answers))
    votes = [majority([answers[i] for i in some]) for some in _subsets(len(answers), k)]
    return sum(vote == reference for vote in votes) / len(votes)


def best_at_k(scores: Sequence[float], right: Sequence[bool], k: int) -> float:
    """Return the probability that the best scored of k of the n answers is right.

    Of equal scores the first is the best.

    Raises:
        ValueError: k is not in 1..n.
    """
    n = len(scores)
    _check_k(k, n)
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    chosen = (math.comb(n - 1 - rank, k - 1) for rank, i in enumerate(order) if right[i])
    return sum(chosen) / math.comb(n, k)


def gated(scores: Sequence[float], threshold: float) -> tuple[int, int]:
    """Return (the answer taken, how many were drawn): answers are drawn until one is good enough.

    Where none reaches `threshold`, it is the best of all.
    """
    for index, score in enumerate(scores):
        if score >= threshold:
            return index, index + 1
    return max(range(len(scores)), key=lambda i: (scores[i], -i)), len(scores)


def auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Return the share of pairs (right, wrong) in which the right one scores higher.

    Equal scores count half; NaN if there is no such pair.
    """
    above, pairs = _ordered(scores, right)
    return above / pairs if pairs else math.nan


def auc_within(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool]]) -> float:
    """Return the same of the pairs that answer one question: what best-of-n hangs on.

    Pooled over questions, a score that only tells easy questions from hard ones looks good too.
    """
    counts = [_ordered(*question) for question in zip(scores, right, strict=True)]
    pairs = sum(number for _, number in counts)
    return sum(above for above, _ in counts) / pairs if pairs else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over questions and its standard error, NaN for fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return float(array.mean()), error


def _ordered(scores: Sequence[float], right: Sequence[bool]) -> tuple[float, int]:
    """Return (pairs in which the right answer scores higher, all pairs)."""
    is_right, values = np.asarray(right, dtype=bool), np.asarray(scores, dtype=np.float64)
    good, bad = values[is_right], np.sort(values[~is_right])
    below = np.searchsorted(bad, good, side="left")
    up_to = np.searchsorted(bad, good, side="right")
    return float((below + up_to).sum() / 2), len(good) * len(bad)


def _subsets(n: int, k: int) -> Iterator[Sequence[int]]:
    if math.comb(n, k) <= _SUBSETS:
        yield from combinations(range(n), k)
        return
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([n, k])))
    for _ in range(_SUBSETS):
        yield sorted(rng.choice(n, k, replace=False).tolist())


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be in 1 to {n}, the number of answers")
