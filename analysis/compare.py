"""Means over seeds, and differences paired by seed with their confidence interval."""

import numpy as np
import pandas as pd
from scipy import stats


def over_seeds(table: pd.DataFrame, by: list[str], metric: str) -> pd.DataFrame:
    """Return mean, standard deviation (NaN at n = 1) and n of `metric` for each group of `by`."""
    _require(table, [*by, metric])
    grouped = table.groupby(by, dropna=False)[metric]
    return grouped.agg(mean="mean", std="std", n="count").reset_index()


def paired_difference(
    table: pd.DataFrame, *, key: str, baseline: object, metric: str, pair: list[str],
    confidence: float = 0.95,
) -> pd.DataFrame:  # fmt: skip
    """Return metric minus baseline's metric among runs equal in `pair`, for each value of `key`.

    Columns: value, difference, low, high (Student's t; NaN at n = 1), n, unpaired (runs that have
    no partner).

    Raises:
        ValueError: a pair holds the same value twice, or no run has the baseline.
    """
    _require(table, [key, metric, *pair])
    twice = table.duplicated([key, *pair])
    if twice.any():
        raise ValueError(
            f"{int(twice.sum())} runs are equal in {key} and {pair}; add the key that sets them apart to pair"
        )
    wide = table.pivot(index=pair, columns=key, values=metric)
    if baseline not in wide:
        raise ValueError(f"no run has {key}={baseline}; there are: {list(wide.columns)}")
    rows = []
    for value in [c for c in wide.columns if c != baseline]:
        both = (wide[value] - wide[baseline]).dropna().to_numpy()
        n, mean = len(both), float(np.mean(both)) if len(both) else np.nan
        half = np.nan
        if n > 1:
            t = stats.t.ppf(0.5 + confidence / 2, n - 1)
            half = float(t * np.std(both, ddof=1) / np.sqrt(n))
        rows.append((value, mean, mean - half, mean + half, n, len(wide) - n))
    return pd.DataFrame(rows, columns=["value", "difference", "low", "high", "n", "unpaired"])


def _require(table: pd.DataFrame, columns: list[str]) -> None:
    missing = [c for c in columns if c not in table]
    if missing:
        raise KeyError(
            f"no column {', '.join(missing)}; there are: {', '.join(map(str, table.columns))}"
        )
