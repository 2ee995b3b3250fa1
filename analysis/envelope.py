"""Approach 1 to compute-optimal training: the run of smallest loss after each number of FLOPs.

Curves are smoothed (a Gaussian in log FLOPs), the lower envelope is read at many budgets, and log n
of its runs is regressed on log C. The parts that the smallest or the largest size holds are counted
and not used. Under a decaying learning rate an early point of a long run is worse than the end of a
short one: use constant-rate trunks, or the ends of runs.

Source: Hoffmann et al. arXiv 2203.15556, approach 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import require
from analysis.law import Array

_POINTS = 1500


@dataclass(frozen=True)
class Envelope:
    """The lower envelope and the power laws through it.

    Args:
        points: columns flops, run, n, loss, used of points on the envelope.
        curves: columns run, n, flops, loss of the smoothed curves.
        exponents: rows n and tokens: exponent of C, low, high (resampled runs), coefficient.
        unused: share of the envelope that the smallest or the largest size holds.
    """

    points: pd.DataFrame
    curves: pd.DataFrame
    exponents: pd.DataFrame
    unused: float

    def report(self) -> dict[str, Any]:
        """Return every number, as JSON types."""
        return {
            "exponents": self.exponents.set_index("quantity").to_dict(orient="index"),
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
    sizes = np.sort(table["n"].unique())
    if len(sizes) < 3:
        raise ValueError(f"{len(sizes)} sizes are too few for an envelope: at least 3")
    grid = np.geomspace(table["flops"].min(), table["flops"].max(), _POINTS)
    groups = list(table.groupby("run"))
    smooth = np.stack([_smoothed(part, grid, width) for _, part in groups])
    size = np.array([part["n"].iloc[0] for _, part in groups], dtype=float)
    points, slope, start = _fit(smooth, size, grid, sizes)
    rng, slopes = np.random.default_rng(seed), []
    for _ in range(bootstraps):
        chosen = rng.integers(0, len(groups), len(groups))
        try:
            slopes.append(_fit(smooth[chosen], size[chosen], grid, sizes)[1])
        except ValueError:
            continue  # a resample without a middle size says nothing
    low, high = np.quantile(slopes, [0.025, 0.975]) if len(slopes) > 1 else (np.nan, np.nan)
    exponents = pd.DataFrame(
        [
            ("n", slope, low, high, np.exp(start)),
            ("tokens", 1 - slope, 1 - high, 1 - low, np.exp(-start) / 6),
        ],
        columns=["quantity", "exponent", "low", "high", "coefficient"],
    )
    points["run"] = [groups[i][0] for i in points["run"]]
    shown = [
        pd.DataFrame({"run": name, "n": part["n"].iloc[0], "flops": grid, "loss": line})
        for (name, part), line in zip(groups, smooth, strict=True)
    ]
    return Envelope(
        points,
        pd.concat(shown, ignore_index=True).dropna(),
        exponents,
        float(1 - points["used"].mean()),
    )


def _smoothed(part: pd.DataFrame, grid: Array, width: float) -> Array:
    """Return the smoothed loss on `grid`, NaN outside the run."""
    x, y = np.log(part["flops"].to_numpy()), part["loss"].to_numpy()
    at = np.log(grid)
    smoothed = np.full(len(grid), np.nan)
    inside = (at >= x[0]) & (at <= x[-1])
    weights = np.exp(-0.5 * ((at[inside][:, None] - x[None]) / width) ** 2)
    total = weights.sum(axis=1)
    near = total > 1e-12
    values = np.interp(at[inside], x, y)
    values[near] = (weights @ y)[near] / total[near]
    smoothed[inside] = values
    return smoothed


def _fit(
    smooth: Array, size: Array, grid: Array, sizes: Array
) -> tuple[pd.DataFrame, float, float]:
    known = ~np.isnan(smooth).all(axis=0)
    best = np.nanargmin(smooth[:, known], axis=0)
    points = pd.DataFrame(
        {
            "flops": grid[known],
            "run": best,
            "n": size[best],
            "loss": smooth[:, known][best, np.arange(known.sum())],
        }
    )
    points["used"] = (points["n"] > sizes[0]) & (points["n"] < sizes[-1])
    used = points[points["used"]]
    if used["n"].nunique() < 2:
        raise ValueError(
            "fewer than two sizes between the smallest and the largest are ever the best: "
            "widen the range of FLOPs or add sizes"
        )
    slope, start = np.polyfit(np.log(used["flops"]), np.log(used["n"]), 1)
    return points, float(slope), float(start)
