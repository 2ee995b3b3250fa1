"""What the points of a fit cannot tell, and predictions that lean on it."""

import numpy as np
import pandas as pd

from analysis.fit import Fit
from analysis.robustness import flat_valleys, profiles

_SPREAD = 0.05  # of a logarithm: columns that follow each other so closely are one

_WIDE = "intervals of predictions are conservative then; --law power of one column has none such"


def unidentified(fitted: Fit, allowed: pd.DataFrame | None = None) -> list[str]:
    """Return a sentence for each reason why parameters are not determined by the points.

    Args:
        allowed: from `flat_valleys`; None: profiles are made here.
    """
    if allowed is None:
        allowed = flat_valleys(profiles(fitted))
    found = []
    for index, first in enumerate(fitted.law.columns):
        for second in fitted.law.columns[index + 1 :]:
            reason = _one(fitted.used, first, second)
            found += [f"{reason}: their terms cannot be told apart"] if reason else []
    wide = [_WIDE] if found else []
    flat = list(allowed.loc[allowed["flat"], "parameter"])
    if flat:
        found.append(f"flat valley: the data hardly determine {', '.join(flat)}")
    return found + wide


def missed_minimum(profile: pd.DataFrame) -> list[str]:
    """Return a sentence if a profile fits better than the fit, by more than rounding."""
    lowest = float(profile["statistic"].min())
    if lowest > -0.01:
        return []
    return [f"a profile fits better than the fit, by {-lowest:.2g}: its starts missed the minimum"]


def extrapolation(fitted: Fit, points: pd.DataFrame) -> list[str]:
    """Return a sentence if tokens per parameter of `points` lie outside those fitted.

    Args:
        points: with columns n and d; without them, or for laws of others, nothing is said.
    """
    if not {"n", "d"} <= {*fitted.law.columns} & {*points.columns}:
        return []
    measured = fitted.used["d"] / fitted.used["n"]
    asked = points["d"] / points["n"]
    low, high = measured.min(), measured.max()
    outside = asked[(asked < low * 0.99) | (asked > high * 1.01)]
    if outside.empty:
        return []
    shown = ", ".join(dict.fromkeys(f"{ratio:.4g}" for ratio in outside))
    span = f"{low:.4g}" if high < low * 1.01 else f"{low:.4g} to {high:.4g}"
    return [f"extrapolation: {shown} tokens per parameter, the fitted runs have {span}"]


def _one(points: pd.DataFrame, first: str, second: str) -> str:
    """Return how column `second` follows `first`, "" if it does not."""
    x, y = (np.log(points[name].to_numpy()) for name in (first, second))
    if min(np.ptp(x), np.ptp(y)) <= _SPREAD:
        still = first if np.ptp(x) <= _SPREAD else second
        return f"{still} is {points[still].median():.4g} in all runs"
    slope, start = np.polyfit(x, y, 1)
    if np.std(y - slope * x - start) > _SPREAD:
        return ""
    if abs(slope - 1) < _SPREAD:
        ratio = float(np.median(points[second] / points[first]))
        return f"{second} / {first} is {ratio:.4g} in all runs"
    return f"{second} follows {first}^{slope:.2f} in all runs"
