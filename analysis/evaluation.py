"""The noise of an evaluation: standard errors over its questions, clustered and paired.

Source: Miller, Adding Error Bars to Evals, arXiv 2411.00640.
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.errors import require
from analysis.law import Array


def score_with_error(
    scores: pd.DataFrame, *, score: str, by: str, cluster: str | None = None
) -> pd.DataFrame:
    """Return the mean of `score` for each value of `by`: columns by, mean, se, n, clusters.

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
        rows.append(
            (
                name,
                values.mean(),
                standard_error(values, groups),
                len(values),
                len(np.unique(groups)),
            )
        )
    return pd.DataFrame(rows, columns=[by, "mean", "se", "n", "clusters"])


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
        mean, error = float(gap.mean()), standard_error(gap.to_numpy(dtype=float), labels)
        rows.append((name, mean, error, mean - 1.96 * error, mean + 1.96 * error, len(gap)))
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
