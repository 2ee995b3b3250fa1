"""Means over seeds, and differences, paired by seed or not, with intervals, tests and power."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import optimize, stats

from analysis.errors import require
from analysis.law import Array
from analysis.pooling import is_seed, say_pooled, varied


def over_seeds(
    table: pd.DataFrame,
    by: list[str],
    metric: str,
    *,
    facts: Sequence[str] = (),
    over: Sequence[str] = (),
) -> pd.DataFrame:
    """Return mean, std (NaN at n = 1) and n of `metric` for each group of `by`.

    What the runs of a group differ in besides the seed is said, see `analysis.pooling.say_pooled`.

    Args:
        facts: more columns, of which the mean is returned.
        over: columns over which the mean is meant to be, besides the seed.
    """
    require(table, [*by, metric, *facts])
    grouped = table.groupby(by, dropna=False)
    means = grouped[metric].agg(["mean", "std", "count"]).rename(columns={"count": "n"})
    means = means.join(grouped[list(facts)].mean()).reset_index()
    say_pooled(means, table[table[metric].notna()], [*by, *over], metric)
    return means


def beside_baseline(
    table: pd.DataFrame,
    *,
    key: str,
    baseline: object,
    metric: str,
    pair: list[str],
    facts: Sequence[str] = (),
) -> pd.DataFrame:
    """Return `over_seeds` by `key`, beside each value its `paired_difference` from the baseline.

    The n of the differences is in the column pairs; the baseline's own row has NaN.
    """
    gap = paired_difference(table, key=key, baseline=baseline, metric=metric, pair=pair)
    gap = gap.rename(columns={"value": key, "n": "pairs"})
    means = over_seeds(table, [key], metric, facts=facts, over=pair)
    beside = means.merge(gap, on=key, how="left")
    beside.attrs |= gap.attrs
    return beside


def paired_difference(
    table: pd.DataFrame,
    *,
    key: str,
    baseline: object,
    metric: str,
    pair: list[str],
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Return metric minus baseline's metric among runs equal in `pair`, for each value of `key`.

    Columns: value, difference, low, high (Student's t; NaN at n = 1), p (paired t test, two-sided),
    p_holm (corrected for all the values compared), n, unpaired (runs that have no partner),
    detectable (the smallest difference that this many pairs would have shown with a power of 0.8).

    Raises:
        ValueError: a pair holds the same value twice, or no run has the baseline.
    """
    require(table, [key, metric, *pair])
    twice = table.duplicated([key, *pair])
    if twice.any():
        apart = [c for c in varied(table) if c not in (key, *pair)]
        hint = f", here {' or '.join(map(str, apart[:3]))}" if apart else ""
        raise ValueError(
            f"{int(twice.sum())} runs are equal in {', '.join([key, *pair])}; add the column that "
            f"sets them apart to pair{hint}"
        )
    wide = table.pivot(index=pair, columns=key, values=metric)
    if baseline not in wide:
        raise ValueError(f"no run has {key}={baseline}; there are: {list(wide.columns)}")
    rows = []
    for value in [c for c in wide.columns if c != baseline]:
        gaps = (wide[value] - wide[baseline]).dropna().to_numpy()
        n, mean = len(gaps), float(np.mean(gaps)) if len(gaps) else np.nan
        spread = float(np.std(gaps, ddof=1)) if n > 1 else np.nan
        half = stats.t.ppf(0.5 + confidence / 2, n - 1) * spread / np.sqrt(n) if n > 1 else np.nan
        p = _p_value(mean, spread, n)
        rows.append(
            (value, mean, mean - half, mean + half, p, n, len(wide) - n, detectable(spread, n))
        )
    differences = pd.DataFrame(
        rows, columns=["value", "difference", "low", "high", "p", "n", "unpaired", "detectable"]
    )
    differences.insert(5, "p_holm", holm(differences["p"].to_numpy()))
    alike = [key, *(column for column in pair if not is_seed(column))]
    say_pooled(differences, table[table[metric].notna()], alike, metric)
    return differences


def unpaired_difference(
    table: pd.DataFrame, *, key: str, baseline: object, metric: str, confidence: float = 0.95
) -> pd.DataFrame:
    """Return the mean of `metric` minus the baseline's, over all runs of each value of `key`.

    Columns: value, difference, low, high, p (Welch's t test, two-sided), p_holm (corrected for all
    values compared), n, n_baseline. Intervals and p are NaN where either has fewer than two runs.
    What the runs of a value differ in, all of it, is noise here.

    Raises:
        ValueError: no run has the baseline.
    """
    require(table, [key, metric])
    groups: dict[object, pd.Series[float]] = {
        value: part[metric].dropna() for value, part in table.groupby(key, dropna=False)
    }
    if baseline not in groups:
        raise ValueError(f"no run has {key}={baseline}; there are: {list(groups)}")
    base = groups.pop(baseline)
    rows = []
    for value, scores in groups.items():
        low = high = p = np.nan
        if min(len(scores), len(base)) > 1:
            test = stats.ttest_ind(scores, base, equal_var=False)
            (low, high), p = test.confidence_interval(confidence), float(test.pvalue)
        rows.append((value, scores.mean() - base.mean(), low, high, p, len(scores), len(base)))
    columns = ["value", "difference", "low", "high", "p", "n", "n_baseline"]
    differences = pd.DataFrame(rows, columns=columns)
    differences.insert(5, "p_holm", holm(differences["p"].to_numpy(dtype=float)))
    return differences


def holm(p: Array) -> Array:
    """Return p values corrected by Holm for the family-wise error rate.

    NaN (nothing was tested) stays NaN and does not count.
    """
    corrected = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p) if np.isfinite(p[i])]
    most = 0.0
    for rank, index in enumerate(order):
        most = max(most, (len(order) - rank) * p[index])
        corrected[index] = min(1.0, most)
    return corrected


def detectable(spread: float, n: int, *, power: float = 0.8, level: float = 0.05) -> float:
    """Return the smallest true difference that a paired t test of `n` pairs detects with `power`.

    It is NaN at n < 2.

    Args:
        spread: standard deviation of the differences between pairs, the noise of seeds.
    """
    if n < 2 or not np.isfinite(spread):
        return float("nan")
    critical = stats.t.ppf(1 - level / 2, n - 1)

    def missing(shift: float) -> float:
        return float(stats.nct.sf(critical, n - 1, shift) - power)  # the other tail is nothing here

    most = 1.0
    while missing(most) < 0:
        most *= 1.5
    return float(optimize.brentq(missing, 0.0, most) * spread / np.sqrt(n))


def reached(curves: pd.DataFrame, target: float) -> pd.Series:
    """Return the first x at which the curve of each run is at `target`, log-linear between points.

    It is linear from a point at x = 0, and NaN for a run that never reaches the target.

    Args:
        curves: columns fingerprint, x, value, as `Runs.curves` returns them.
    """
    crossings = {}
    for name, part in curves.dropna().sort_values("x").groupby("fingerprint"):
        x, y = part["x"].to_numpy(dtype=float), part["value"].to_numpy(dtype=float)
        below = np.flatnonzero(y <= target)
        if not len(below):
            crossings[name] = np.nan
        elif below[0] == 0:
            crossings[name] = x[0]
        else:
            i = below[0]
            share = (y[i - 1] - target) / (y[i - 1] - y[i])
            before, after = x[i - 1], x[i]
            crossings[name] = float(
                before * (after / before) ** share if before > 0 else share * after
            )
    return pd.Series(crossings, name="x", dtype=float)


def speed_up(
    runs: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    key: str,
    baseline: object,
    pair: list[str],
    target: float,
) -> pd.DataFrame:
    """Return how much sooner than the baseline each value of `key` reaches `target`, paired.

    Columns: value, speed_up (geometric mean of the baseline's x over its own), low, high (95%), n,
    never (runs that do not reach the target; without them the mean is too good).

    Args:
        runs: columns fingerprint, `key` and `pair`.
        curves: as in `reached`, x being steps, FLOPs or seconds.
    """
    table = runs.assign(log_x=np.log(runs["fingerprint"].map(reached(curves, target))))
    gap = paired_difference(table, key=key, baseline=baseline, metric="log_x", pair=pair)
    never = table[table["log_x"].isna()].groupby(key, dropna=False).size()
    return pd.DataFrame(
        {
            "value": gap["value"],
            "speed_up": np.exp(-gap["difference"]),
            "low": np.exp(-gap["high"]),
            "high": np.exp(-gap["low"]),
            "n": gap["n"],
            "never": [int(never.get(v, 0)) for v in gap["value"]],
        }
    )


def _p_value(mean: float, spread: float, n: int) -> float:
    if n < 2:
        return float("nan")
    if spread == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2 * stats.t.sf(abs(mean) * np.sqrt(n) / spread, n - 1))
