"""Approach 2 to compute-optimal training: the size of smallest loss at each budget, a power law.

The minimum is that of a parabola in log N, fitted robustly, or of an Akima spline through the means
over seeds. Intervals come from a parametric bootstrap with the noise of the runs. A parabola is
biased where the curve is none: the bias is measured on noise-free losses of a Chinchilla law fitted
to the same runs, whose optimum is known.

Source: Hoffmann et al. arXiv 2203.15556, approach 2; Huber, Robust Statistics, for the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from analysis.errors import require
from analysis.fit import fit
from analysis.law import Array
from analysis.laws import CHINCHILLA

Method = Literal["parabola", "akima"]
Minimum = tuple[float, float, Array] | str  # log n, loss, curve on a grid; or why there is none
Find = Callable[[Array, Array], Minimum]
_SAME_BUDGET = 0.05  # natural log: budgets this close are one
_MIN_SIZES = 4  # three always lie on a parabola
_HUBER = 1.345  # standard deviations: 95% efficient for normal noise


@dataclass(frozen=True)
class IsoFlop:
    """The minimum of each budget and the power laws through them.

    Args:
        budgets: a row for each: flops; n and tokens at the minimum with _low and _high; loss there;
            bias (log of estimated over true n for the fitted law); sizes (their number); noise;
            rejected (the reason, or "").
        exponents: rows n and tokens: exponent of C, low, high, coefficient.
        curves: the fitted curves, for the figure: flops, n, loss.
        points: the runs with their budget.
        left_out: numbers of rows not used, by the reason.
    """

    budgets: pd.DataFrame
    exponents: pd.DataFrame
    curves: pd.DataFrame
    points: pd.DataFrame
    left_out: dict[str, int]
    method: Method

    def counts(self) -> str:
        """Return a sentence: how many points and budgets were used, and why others were not."""
        parts = [f"{len(self.points)} points at {len(self.budgets)} budgets"]
        parts += _rejections(self.budgets)
        parts += [f"{count} left out: {why}" for why, count in self.left_out.items()]
        return "; ".join(parts)

    def report(self) -> dict[str, Any]:
        """Return every number, as JSON types."""
        return {
            "method": self.method,
            "exponents": self.exponents.set_index("quantity").to_dict(orient="index"),
            "budgets": self.budgets.to_dict(orient="records"),
            "points": {"used": len(self.points), "left_out": self.left_out},
        }


def _rejections(budgets: pd.DataFrame) -> list[str]:
    pairs = zip(budgets["flops"], budgets["rejected"], strict=True)
    return [f"{flops:.3g} FLOPs rejected: {why}" for flops, why in pairs if why]


def isoflop(
    table: pd.DataFrame,
    *,
    flops: str,
    n: str,
    loss: str,
    tokens: str | None = None,
    method: Method = "parabola",
    bootstraps: int = 1000,
    seed: int = 0,
) -> IsoFlop:
    """Return the size of smallest loss at each budget and its growth with compute.

    Args:
        flops, n, loss, tokens: columns; tokens default to flops / 6n.

    Raises:
        KeyError: a column is missing.
        ValueError: fewer than two budgets have a minimum; names the reason for each.
    """
    points, left_out = _points(table, flops, n, loss, tokens)
    find = METHODS[method]
    rng, rows, curves = np.random.default_rng(seed), [], []
    draws: dict[str, list[Array]] = {"n": [], "tokens": []}
    for budget, part in points.groupby("budget"):
        losses = part["loss"].to_numpy()
        log_n, log_d = (np.log(part[column].to_numpy()) for column in ("n", "d"))
        by_n, n_draws, curve = _one(find, "n", log_n, losses, rng, bootstraps)
        by_tokens, token_draws, _ = _one(find, "tokens", log_d, losses, rng, bootstraps)
        if by_tokens["rejected"] and not by_n["rejected"]:
            by_n["rejected"] = f"by tokens, {by_tokens['rejected']}"
        rows.append({"flops": budget} | by_tokens | by_n)
        if not by_n["rejected"]:
            draws["n"].append(n_draws)
            draws["tokens"].append(token_draws)
        if curve is not None:
            curves.append(curve.assign(flops=budget))
    budgets = pd.DataFrame(rows)
    accepted = budgets[budgets["rejected"] == ""]
    if len(accepted) < 2:
        why = "; ".join(_rejections(budgets))
        raise ValueError(
            f"{len(accepted)} of {len(budgets)} budgets have a minimum, at least 2 are needed. "
            f"{why}"
        )
    bias = pd.DataFrame({"flops": accepted["flops"], "bias": _bias(points, accepted, find)})
    budgets = budgets.merge(bias, on="flops", how="left")
    return IsoFlop(
        budgets,
        _exponents(accepted, draws),
        pd.concat(curves, ignore_index=True),
        points,
        left_out,
        method,
    )


def _points(
    table: pd.DataFrame, flops: str, n: str, loss: str, tokens: str | None
) -> tuple[pd.DataFrame, dict[str, int]]:
    names = {"flops": flops, "n": n, "loss": loss} | ({"d": tokens} if tokens else {})
    require(table, list(names.values()))
    points = pd.DataFrame({k: pd.to_numeric(table[c], errors="coerce") for k, c in names.items()})
    good = (points > 0).all(axis=1)
    left_out = {"a value is missing or not positive": int((~good).sum())} if not good.all() else {}
    points = points[good].sort_values("flops").reset_index(drop=True)
    if not tokens:
        points["d"] = points["flops"] / (6 * points["n"])
    group = (np.log(points["flops"]).diff() > _SAME_BUDGET).cumsum()
    points["budget"] = np.exp(np.log(points["flops"]).groupby(group).transform("mean"))
    return points, left_out


def _one(
    find: Find, name: str, x: Array, y: Array, rng: np.random.Generator, bootstraps: int
) -> tuple[dict[str, Any], Array, pd.DataFrame | None]:
    """Return (row of one budget, bootstrapped minima (log), fitted curve); `name` is the size's."""
    sizes = np.unique(x)
    minimum: Minimum = f"{len(sizes)} sizes are fewer than {_MIN_SIZES}"
    if len(sizes) >= _MIN_SIZES:
        minimum = find(x, y)
    if isinstance(minimum, str):
        none = dict.fromkeys((name, f"{name}_low", f"{name}_high", "loss", "noise"), np.nan)
        return none | {"sizes": len(sizes), "rejected": minimum}, np.empty(0), None
    best, least, grid = minimum
    line = np.linspace(sizes[0], sizes[-1], len(grid))
    fitted = np.interp(x, line, grid)
    noise = _noise(x, y, fitted)
    draws = np.full(bootstraps, np.nan)
    for index in range(bootstraps):
        resampled = find(x, fitted + rng.normal(0.0, noise, len(x)))
        draws[index] = resampled[0] if not isinstance(resampled, str) else np.nan
    lost = float(np.mean(np.isnan(draws)))
    row = {
        name: np.exp(best),
        f"{name}_low": np.exp(np.nanquantile(draws, 0.025)),
        f"{name}_high": np.exp(np.nanquantile(draws, 0.975)),
        "loss": least,
        "sizes": len(sizes),
        "noise": noise,
        "rejected": f"{lost:.0%} of the bootstraps have no minimum" if lost > 0.2 else "",
    }
    curve = pd.DataFrame({"n": np.exp(line), "loss": grid})
    return row, np.where(np.isnan(draws), best, draws), curve


def _noise(x: Array, y: Array, fitted: Array) -> float:
    """Return the standard deviation within sizes of several runs, else about the curve."""
    frame = pd.DataFrame({"x": x, "y": y})
    spare = len(x) - len(np.unique(x))
    if spare >= 3:
        within = frame["y"] - frame.groupby("x")["y"].transform("mean")
        return float(np.sqrt((within**2).sum() / spare))
    return float(np.sqrt(np.sum((y - fitted) ** 2) / max(1, len(x) - 3)))


def _parabola(x: Array, y: Array) -> Minimum:
    """Return the minimum (log n, loss) and the curve on a grid, or why there is none."""
    middle = x.mean()
    design = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], axis=1)
    weights = np.ones_like(y)
    for _ in range(20):
        root = np.sqrt(weights)
        c, *_ = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)
        residual = np.abs(y - design @ c)
        scale = 1.4826 * np.median(residual)
        if scale <= 1e-12:
            break
        weights = np.minimum(1.0, _HUBER * scale / np.maximum(residual, 1e-300))
    if c[2] <= 0:
        return "the parabola opens downwards"
    best = middle - c[1] / (2 * c[2])
    if not x.min() < best < x.max():
        return "the minimum lies outside the sizes"
    grid = np.linspace(x.min(), x.max(), 200) - middle
    return float(best), float(c[0] - c[1] ** 2 / (4 * c[2])), c[0] + c[1] * grid + c[2] * grid**2


def _akima(x: Array, y: Array) -> Minimum:
    """Return what `_parabola` does, for a spline through the mean of each size."""
    means = pd.Series(y).groupby(x).mean()
    sizes = means.index.to_numpy(dtype=float)
    line = np.linspace(sizes[0], sizes[-1], 200)
    curve = Akima1DInterpolator(sizes, means.to_numpy())(line)
    lowest = int(np.argmin(curve))
    if lowest in (0, len(line) - 1):
        return "the smallest loss is at the edge of the sizes"
    return float(line[lowest]), float(curve[lowest]), curve


METHODS: dict[str, Find] = {
    "parabola": _parabola,
    "akima": _akima,
}


def _log_tokens(part: pd.DataFrame, log_n: Array) -> Array:
    slope, start = np.polyfit(np.log(part["n"].to_numpy()), np.log(part["d"].to_numpy()), 1)
    along: Array = start + slope * log_n
    return along


def _exponents(accepted: pd.DataFrame, draws: dict[str, list[Array]]) -> pd.DataFrame:
    c, rows = np.log(accepted["flops"].to_numpy()), []
    for name, minima in draws.items():
        slope, start = np.polyfit(c, np.log(accepted[name].to_numpy()), 1)
        low, high = np.quantile(np.polyfit(c, np.stack(minima), 1)[0], [0.025, 0.975])
        rows.append((name, slope, low, high, float(np.exp(start))))
    return pd.DataFrame(rows, columns=["quantity", "exponent", "low", "high", "coefficient"])


def _bias(points: pd.DataFrame, accepted: pd.DataFrame, find: Find) -> Array:
    """Return log(estimated / true n) on noise-free losses of a law fitted to the points."""
    if len(points) < 8:
        return np.full(len(accepted), np.nan)
    law = fit(
        points,
        CHINCHILLA,
        columns={"n": "n", "d": "d"},
        loss="loss",
        bootstraps=0,
        starts=CHINCHILLA.start_grid()[::9],
    )
    biases = []
    for budget in accepted["flops"].to_numpy(dtype=float):
        part = points[points["budget"] == budget]

        def loss(x: Array, part: pd.DataFrame = part) -> Array:
            return CHINCHILLA.predict(
                law.theta, {"n": np.exp(x), "d": np.exp(_log_tokens(part, x))}
            )

        x = np.log(part["n"].to_numpy())
        line = np.linspace(x.min() - 1, x.max() + 1, 20001)
        minimum = find(x, loss(x))
        biases.append(
            np.nan if isinstance(minimum, str) else minimum[0] - line[np.argmin(loss(line))]
        )
    return np.array(biases)
