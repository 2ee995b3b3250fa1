"""Approach 1 to compute-optimal training: the run of smallest loss after each number of FLOPs.

Curves are smoothed (a Gaussian in log FLOPs), the lower envelope is read at many budgets, and log n
of its runs is regressed on log C. The parts that the smallest or the largest size holds are counted
and not used. Under a decaying learning rate an early point of a long run is worse than the end of a
short one: use constant-rate trunks, or the ends of runs.

An envelope over few sizes has a bias, and resampled runs would lack the sizes that made it: both
bias and interval come from a parametric bootstrap (`analysis.envelope_bootstrap`), and the bias is
subtracted.

Source: Hoffmann et al. arXiv 2203.15556, approach 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.envelope_bootstrap import Curve, bias_and_deviations
from analysis.errors import require
from analysis.law import Array

_POINTS = 1500
_COARSE = 5  # of the budgets, every fifth is read on copies


@dataclass(frozen=True)
class Envelope:
    """The lower envelope and the power laws through it.

    Args:
        points: columns flops, run, n, loss, used of points on the envelope.
        curves: columns run, n, flops, loss of the smoothed curves.
        exponents: rows n and tokens: exponent of C, low, high (95%, NaN where how runs differ is
            not known), coefficient.
        unused: share of the envelope that the smallest or the largest size holds.
        bias: of the exponent of n; it is subtracted. NaN where it is not known.
    """

    points: pd.DataFrame
    curves: pd.DataFrame
    exponents: pd.DataFrame
    unused: float
    bias: float

    def report(self) -> dict[str, Any]:
        """Return every number, as JSON types."""
        return {
            "exponents": self.exponents.set_index("quantity").to_dict(orient="index"),
            "bias": self.bias,
            "unused_share": self.unused,
            "runs": int(self.curves["run"].nunique()),
            "switches": self.points.groupby("n")["flops"]
            .agg(["min", "max"])
            .reset_index()
            .to_dict(orient="records"),
        }


def envelope(
    curves: pd.DataFrame,
    *,
    run: str,
    n: str,
    flops: str,
    loss: str,
    width: float = 0.1,
    bootstraps: int = 500,
    seed: int = 0,
) -> Envelope:
    """Return the lower envelope of training curves and the power laws through it.

    Args:
        curves: a row for each logged point, in columns `run`, `n`, `flops` and `loss`.
        width: of the smoothing, in natural log of FLOPs.

    Raises:
        KeyError: a column is missing.
        ValueError: fewer than three sizes, or fewer than two between the ends are on the envelope.
    """
    require(curves, [run, n, flops, loss])
    table = pd.DataFrame(
        {"run": curves[run], "n": curves[n], "flops": curves[flops], "loss": curves[loss]}
    ).dropna()
    table = table[(table["flops"] > 0) & (table["loss"] > 0)].sort_values(["run", "flops"])
    if table["n"].nunique() < 3:
        raise ValueError(f"{table['n'].nunique()} sizes are too few for an envelope: at least 3")
    grid = np.geomspace(table["flops"].min(), table["flops"].max(), _POINTS)
    log_c, groups = np.log(grid), list(table.groupby("run"))
    runs = [
        Curve(float(part["n"].iloc[0]), np.log(part["flops"].to_numpy()), part["loss"].to_numpy())
        for _, part in groups
    ]
    lines = np.stack([smoothed(c.x, c.y[:, None], log_c, width)[:, 0] for c in runs])
    size = np.array([curve.n for curve in runs])
    slope = float(_slopes(lines[None], size, log_c)[0])
    if np.isnan(slope):
        raise ValueError(
            "fewer than two sizes between the smallest and the largest are ever the best: "
            "widen the range of FLOPs or add sizes"
        )
    bias, moved = bias_and_deviations(
        runs,
        log_c[::_COARSE],
        lambda x, y: smoothed(x, y, log_c[::_COARSE], width),
        lambda copies: _slopes(copies, size, log_c[::_COARSE]),
        bootstraps,
        seed,
    )
    points, names = _lowest(lines, size, grid), np.array([name for name, _ in groups])
    shown = pd.DataFrame({"run": np.repeat(names, _POINTS), "n": np.repeat(size, _POINTS)})
    shown = shown.assign(flops=np.tile(grid, len(runs)), loss=lines.ravel()).dropna()
    points["run"] = names[points["run"]]
    exponents = _exponents(points[points["used"]], slope - float(np.nan_to_num(bias)), moved)
    unused = float(1 - points["used"].mean())
    return Envelope(points, shown.reset_index(drop=True), exponents, unused, bias)


def smoothed(x: Array, y: Array, at: Array, width: float) -> Array:
    """Return the smoothed losses [G, B] at log FLOPs `at` [G], NaN outside the run.

    Args:
        x: log FLOPs [M], increasing; y: losses [M, B].
    """
    result = np.full((len(at), y.shape[1]), np.nan)
    inside = np.flatnonzero((at >= x[0]) & (at <= x[-1]))
    weights = np.exp(-0.5 * ((at[inside][:, None] - x[None]) / width) ** 2)
    total = weights.sum(axis=1)
    near = total > 1e-12
    result[inside[near]] = (weights[near] @ y) / total[near, None]
    far = inside[~near]  # between points many widths apart
    if len(far):
        right = np.clip(np.searchsorted(x, at[far]), 1, len(x) - 1)
        share = ((at[far] - x[right - 1]) / (x[right] - x[right - 1]))[:, None]
        result[far] = (1 - share) * y[right - 1] + share * y[right]
    return result


def _best(lines: Array) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the run of smallest loss [B, G] among `lines` [B, R, G], and where there is one."""
    losses = np.where(np.isnan(lines), np.inf, lines)
    best = losses.argmin(axis=1)
    return best, np.isfinite(np.take_along_axis(losses, best[:, None], axis=1)[:, 0])


def _slopes(lines: Array, size: Array, log_c: Array) -> Array:
    """Return the slope of log n over log C on each envelope [B]; NaN where fewer than two sizes.

    Args:
        lines: smoothed losses [B, R, G]; size: n of each run [R].
    """
    best, known = _best(lines)
    n = size[best]
    used = known & (n > size.min()) & (n < size.max())
    with np.errstate(all="ignore"):
        count = used.sum(axis=1)
        x = np.where(used, log_c, 0.0)
        y = np.where(used, np.log(n), 0.0)
        middle = x.sum(axis=1) / count
        apart = np.where(used, log_c - middle[:, None], 0.0)
        slopes = (apart * y).sum(axis=1) / np.square(apart).sum(axis=1)
    two = np.where(used, n, -np.inf).max(axis=1) > np.where(used, n, np.inf).min(axis=1)
    return np.where(two, slopes, np.nan)


def _lowest(lines: Array, size: Array, grid: Array) -> pd.DataFrame:
    """Return the points of the envelope of `lines` [R, G]; column run numbers them."""
    best, known = (of_one[0] for of_one in _best(lines[None]))
    best = best[known]
    points = pd.DataFrame({"flops": grid[known], "run": best, "n": size[best]})
    points["loss"] = lines[best, np.flatnonzero(known)]
    return points.assign(used=(points["n"] > size.min()) & (points["n"] < size.max()))


def _exponents(used: pd.DataFrame, slope: float, moved: Array) -> pd.DataFrame:
    """Return the rows of the power laws through the middle of the points used.

    Args:
        moved: deviations of the slope on copies, empty: not known.
    """
    low, high = slope - np.quantile(moved, [0.975, 0.025]) if len(moved) else (np.nan, np.nan)
    start = np.log(used["n"]).mean() - slope * np.log(used["flops"]).mean()
    rows = [
        ("n", slope, low, high, np.exp(start)),
        ("tokens", 1 - slope, 1 - high, 1 - low, np.exp(-start) / 6),
    ]
    return pd.DataFrame(rows, columns=["quantity", "exponent", "low", "high", "coefficient"])
