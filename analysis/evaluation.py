"""The noise of an evaluation: standard errors and intervals over its questions, also clustered.

An interval has Student's t of the clusters less one. Of scores that are all 0 or 1 it is Wilson's,
with the number of questions that would have the standard error found, and of their differences
Agresti and Min's: symmetric ones miss rare answers, and are empty where all scores are equal.

Source: Miller, Adding Error Bars to Evals, arXiv 2411.00640; Franco et al., Journal of Survey
Statistics and Methodology 7 (2019), for Wilson's interval of clustered scores; Agresti and Min,
Statistics in Medicine 24 (2005), for differences of pairs.
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.errors import require
from analysis.law import Array


def score_with_error(
    scores: pd.DataFrame, *, score: str, by: str, cluster: str | None = None
) -> pd.DataFrame:
    """Return the mean of `score` for each value of `by`.

    Columns: by, mean, se, low, high (95%), n, clusters.

    Args:
        scores: a row for each question and run.
        cluster: a column; the scores of questions that share its value (a passage) are correlated,
            and the standard error accounts for it.
    """
    require(scores, [score, by, *([cluster] if cluster else [])])
    rows = []
    for name, part in scores.groupby(by, dropna=False):
        values = part[score].to_numpy(dtype=float)
        groups: NDArray[Any] = part[cluster].to_numpy() if cluster else np.arange(len(part))
        mean, count = float(values.mean()), len(np.unique(groups))
        error = standard_error(values, groups)
        ends = mean_interval(mean, error, count)
        if np.isin(values, (0.0, 1.0)).all():
            ends = wilson_interval(mean, error, count)
        rows.append((name, mean, error, *ends, len(values), count))
    return pd.DataFrame(rows, columns=[by, "mean", "se", "low", "high", "n", "clusters"])


def paired_score(
    scores: pd.DataFrame,
    *,
    score: str,
    by: str,
    baseline: object,
    question: str,
    cluster: str | None = None,
) -> pd.DataFrame:
    """Return the mean difference from the baseline over the questions that both answered.

    Columns: by, difference, se, low, high (95%), n. The difficulty of a question cancels.

    Args:
        question: the column by which two scores are paired; cluster: as in `score_with_error`.

    Raises:
        ValueError: no row has the baseline, or a value of `by` has a question twice.
    """
    require(scores, [score, by, question, *([cluster] if cluster else [])])
    if scores.duplicated([by, question]).any():
        raise ValueError(
            f"a value of {by} has a question twice: choose the run by a column that tells them "
            "apart"
        )
    wide = scores.pivot(index=question, columns=by, values=score)
    if baseline not in wide:
        raise ValueError(f"no row has {by}={baseline}; there are: {list(wide.columns)}")
    groups = scores.drop_duplicates(question).set_index(question)[cluster] if cluster else None
    rows = []
    for name in [c for c in wide.columns if c != baseline]:
        gap = (wide[name] - wide[baseline]).dropna()
        labels: NDArray[Any] = (
            groups.loc[gap.index].to_numpy() if groups is not None else np.arange(len(gap))
        )
        gaps = gap.to_numpy(dtype=float)
        mean, error, count = float(gap.mean()), standard_error(gaps, labels), len(np.unique(labels))
        ends = mean_interval(mean, error, count)
        if np.isin(wide.loc[gap.index, [name, baseline]], (0.0, 1.0)).all():
            ends = _agresti_min(gaps, labels)
        rows.append((name, mean, error, *ends, len(gap)))
    return pd.DataFrame(rows, columns=[by, "difference", "se", "low", "high", "n"])


def standard_error(values: Array, clusters: NDArray[Any]) -> float:
    """Return the cluster-robust standard error of the mean of `values` [M].

    It is NaN for fewer than two clusters.
    """
    labels, index = np.unique(clusters, return_inverse=True)
    count = len(labels)
    if count < 2:
        return float("nan")
    sums = np.bincount(index, weights=values - values.mean())
    return float(np.sqrt(np.sum(sums**2) * count / (count - 1)) / len(values))


def mean_interval(mean: float, error: float, clusters: int) -> tuple[float, float]:
    """Return the 95% interval of a mean by Student's t, NaN for fewer than two clusters."""
    half = _quantile(clusters) * error
    return mean - half, mean + half


def wilson_interval(share: float, error: float, clusters: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of right answers, NaN for fewer than two clusters.

    Where all answers are alike and nothing is known of their clusters, each cluster counts once.
    """
    if clusters < 2:
        return float("nan"), float("nan")
    count = share * (1 - share) / error**2 if error > 0 else float(clusters)
    z = _quantile(clusters)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return float(middle - half), float(middle + half)


def _agresti_min(gaps: Array, clusters: NDArray[Any]) -> tuple[float, float]:
    """Return the 95% interval of the mean of gaps -1, 0, 1: half a pair of each outcome is added.

    The outcomes are both right, both wrong, and one of them right, twice.
    """
    labels, index = np.unique(clusters, return_inverse=True)
    if len(labels) < 2:
        return float("nan"), float("nan")
    total = len(gaps) + 2
    mean = gaps.sum() / total
    sums = np.bincount(index, weights=gaps - mean)
    added = 0.5 * np.square(np.array([0.0, 0.0, 1.0, -1.0]) - mean).sum()
    return mean_interval(float(mean), float(np.sqrt(np.sum(sums**2) + added) / total), len(labels))


def _quantile(clusters: int) -> float:
    return float(stats.t.ppf(0.975, clusters - 1)) if clusters > 1 else float("nan")
