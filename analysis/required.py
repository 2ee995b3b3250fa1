"""The size that a task requires, and where the requirements of two kinds of runs cross.

A run passes if its metric reaches a level. The required size lies between the largest size that
fails and the smallest that passes, on a line of the metric against the logarithm of the size. Where
no size passes it is unknown, beyond the largest; where all do, it is at most the smallest.
"""

from typing import Literal

import numpy as np
import pandas as pd

from analysis.errors import require
from analysis.law import Array

Bound = Literal["", "above", "below"]


def required_sizes(
    runs: pd.DataFrame,
    *,
    by: list[str],
    metric: str = "recall",
    level: float = 0.95,
    size: str = "num_parameters",
    seed: str = "seed",
) -> pd.DataFrame:
    """Return the required size for each group of `by` and each seed: a row each.

    Columns: by, seed, required, bound. Of bound "above" `required` is the largest size, none of
    which passes; of "below" the smallest, all of which pass; "" is between two sizes.
    """
    require(runs, [*by, metric, size, seed])
    rows = []
    for key, part in runs.dropna(subset=[metric]).groupby([*by, seed], dropna=False):
        ordered = part.sort_values(size)
        found, bound = _required(
            ordered[size].to_numpy(float), ordered[metric].to_numpy(float), level
        )
        rows.append([*key, found, bound])
    return pd.DataFrame(rows, columns=[*by, seed, "required", "bound"])


def _required(sizes: Array, values: Array, level: float) -> tuple[float, Bound]:
    passing = values >= level
    if not passing.any():
        return float(sizes[-1]), "above"
    first = int(np.argmax(passing))
    if first == 0:
        return float(sizes[0]), "below"
    share = (level - values[first - 1]) / (values[first] - values[first - 1])
    low, high = np.log(sizes[first - 1]), np.log(sizes[first])
    return float(np.exp(low + share * (high - low))), ""


def over_seeds_required(required: pd.DataFrame, *, by: list[str]) -> pd.DataFrame:
    """Return the median and the range over seeds: columns by, median, low, high, n, bound.

    The bound is "above" or "below" where it is so for at least half of the seeds.
    """
    rows = []
    for key, part in required.groupby(by, dropna=False):
        values = part["required"]
        counts = part["bound"].value_counts()
        most = next((b for b in ("above", "below") if 2 * counts.get(b, 0) >= len(part)), "")
        rows.append([*key, values.median(), values.min(), values.max(), len(part), most])
    return pd.DataFrame(rows, columns=[*by, "median", "low", "high", "n", "bound"])


def crossover(
    required: pd.DataFrame,
    *,
    x: str,
    kind: str,
    rising: str,
    flat: str,
    draws: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return (crossing, low, high): the x from which `rising` requires more than `flat`.

    The lines go through the medians over seeds, straight in logarithms; the interval is that of a
    bootstrap over seeds. NaN where they do not cross within what was measured. Sizes that are only
    bounded count at their bound: a crossing that hangs on one is a bound too.

    Args:
        kind: the column that holds `rising` and `flat`.
    """
    values = {
        name: [
            part["required"].to_numpy(float)
            for _, part in required[required[kind] == name].groupby(x)
        ]
        for name in (rising, flat)
    }
    common = np.array(sorted(set(required[x])), dtype=float)
    if any(len(values[name]) != len(common) for name in values):
        raise ValueError(
            f"{rising} and {flat} must have runs at the same values of {x}; give runs of both"
        )
    rng = np.random.default_rng(0)
    found = _crossing(common, *([np.median(v) for v in values[name]] for name in (rising, flat)))
    drawn = np.array(
        [
            _crossing(
                common,
                *(
                    [float(np.median(rng.choice(v, len(v)))) for v in values[name]]
                    for name in (rising, flat)
                ),
            )
            for _ in range(draws)
        ]
    )
    tail = (1 - confidence) / 2
    known = drawn[~np.isnan(drawn)]
    if not len(known) or np.isnan(found):
        return float("nan"), float("nan"), float("nan")
    low, high = np.quantile(known, [tail, 1 - tail])
    return found, float(low), float(high)


def _crossing(x: Array, rising: list[float], flat: list[float]) -> float:
    """Return the last x at which `rising` comes from below `flat`, on straight lines in logs."""
    gap = np.log(rising) - np.log(flat)
    at = np.log(x)
    places = np.flatnonzero((gap[:-1] <= 0) & (gap[1:] > 0))
    if not len(places):
        return float("nan")
    i = int(places[-1])
    share = -gap[i] / (gap[i + 1] - gap[i])
    return float(np.exp(at[i] + share * (at[i + 1] - at[i])))
