"""Runs at equal budgets: grouping, the shape of their loss, their noise, their outliers."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from analysis.errors import require
from analysis.fit import fit
from analysis.law import Array
from analysis.laws import CHINCHILLA
from analysis.minima import MIN_SIZES, robust_parabola
from analysis.points import refuse
from analysis.projection import variable_projection

_SAME_BUDGET = 0.05  # natural log: budgets this close are one
_MIN_POINTS = 8  # for a law
_WINSOR = 3.0  # standard deviations: a residual beyond counts as one there
_LEAST = 1e-3  # of a parameter that least squares puts at zero
_OUTLIER = 4.0  # standard deviations


@dataclass(frozen=True)
class Shape:
    """A Chinchilla law along the sizes of one budget, moved in log n.

    Args:
        theta: the law's parameters [5]; reach: the smallest and largest log n of the runs.
        tokens: slope and start of log tokens over log n; shift: of log n.
    """

    theta: Array
    reach: tuple[float, float]
    tokens: tuple[float, float]
    shift: float = 0.0

    @classmethod
    def of(cls, theta: Array, part: pd.DataFrame) -> "Shape":
        """Return the shape of the law `theta` at the runs of one budget."""
        log_n, log_d = (np.log(part[name].to_numpy()) for name in ("n", "d"))
        slope, start = np.polyfit(log_n, log_d, 1)
        return cls(theta, (log_n.min(), log_n.max()), (float(slope), float(start)))

    def losses(self, x: Array) -> Array:
        """Return the loss at log sizes `x`."""
        at = x - self.shift
        tokens = self.tokens[0] * at + self.tokens[1]
        return CHINCHILLA.predict(self.theta, {"n": np.exp(at), "d": np.exp(tokens)})

    @property
    def minimum(self) -> tuple[float, float]:
        """Log n and log tokens of the smallest loss."""
        ends = (self.reach[0] - 3 + self.shift, self.reach[1] + 3 + self.shift)
        found = minimize_scalar(
            lambda x: float(self.losses(np.array([x]))[0]),
            bounds=ends,
            method="bounded",
            options={"xatol": 1e-9},
        )
        return float(found.x), self.tokens[0] * float(found.x) + self.tokens[1]

    def moved(self, shift: float) -> "Shape":
        """Return the shape, moved by `shift` more."""
        return replace(self, shift=self.shift + shift)


def budget_points(
    table: pd.DataFrame, flops: str, n: str, loss: str, tokens: str | None
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return columns flops, n, d, loss, budget, row (the table's), and rows left out by the reason.

    Raises:
        KeyError: a column is missing.
        ValueError: a value is infinite; names the row.
    """
    names = {"flops": flops, "n": n, "loss": loss} | ({"d": tokens} if tokens else {})
    require(table, list(names.values()))
    points = pd.DataFrame(
        {k: pd.to_numeric(table[c], errors="coerce").astype(float) for k, c in names.items()}
    )
    for name, column in names.items():
        refuse(points[name], np.isinf(points[name]), column, "a finite number; leave the row out")
    good = (points > 0).all(axis=1)
    left_out = {"a value is missing or not positive": int((~good).sum())} if not good.all() else {}
    points = points.assign(row=table.index)[good].sort_values("flops").reset_index(drop=True)
    if not tokens:
        points["d"] = points["flops"] / (6 * points["n"])
    group = (np.log(points["flops"]).diff() > _SAME_BUDGET).cumsum()
    points["budget"] = np.exp(np.log(points["flops"]).groupby(group).transform("mean"))
    return points, left_out


def fitted_law(points: pd.DataFrame) -> Array | None:
    """Return the parameters [5] of a Chinchilla law fitted to all runs, None if there are few.

    The start is the law of least squares, whose search sees every exponent.
    """
    if len(points) < _MIN_POINTS:
        return None
    squares = variable_projection(*(points[name].to_numpy() for name in ("n", "d", "loss")))
    start = np.maximum(squares["estimate"].to_numpy(), _LEAST)
    named = dict(zip(squares["parameter"], start, strict=True))
    theta = CHINCHILLA.theta({name: np.array([value]) for name, value in named.items()})
    rows = points[["n", "d", "loss"]]
    return fit(rows, CHINCHILLA, columns={}, loss="loss", bootstraps=0, starts=theta).theta


def noise_of_runs(points: pd.DataFrame, law: Array | None) -> tuple[float, int]:
    """Return the standard deviation of a run, a share of its loss, and its degrees of freedom.

    Args:
        law: what is subtracted first; a parabola in log n is taken out at each budget besides.
    """
    left, degrees = [], 0
    for _, part in _about(points, law).groupby("budget"):
        log_n = np.log(part["n"].to_numpy())
        basis = np.vander(log_n - log_n.mean(), min(3, part["n"].nunique()))
        q, _ = np.linalg.qr(basis)
        residual = part["about"].to_numpy() - q @ (q.T @ part["about"].to_numpy())
        free = np.maximum(1e-9, 1 - np.square(q).sum(axis=1))
        degrees += len(part) - basis.shape[1]
        left.append(np.where(free > 1e-6, residual / np.sqrt(free), 0.0))
        left[-1] = np.stack([left[-1], free])
    if degrees < 1:
        return 0.0, 0
    scaled, free = np.concatenate(left, axis=1)
    limit = _WINSOR * 1.4826 * np.median(np.abs(scaled[free > 1e-6]))
    squares = np.square(np.clip(scaled, -limit, limit)) * free
    return float(np.sqrt(squares.sum() / degrees)), degrees


def outliers(points: pd.DataFrame, law: Array | None, noise: float) -> pd.DataFrame:
    """Return runs far from a robust parabola at their budget: row, flops, n, loss, deviations.

    Args:
        noise: standard deviation of a run, a share of its loss.
    """
    found = []
    for _, part in _about(points, law).groupby("budget"):
        x, y = np.log(part["n"].to_numpy()), part["about"].to_numpy()
        if part["n"].nunique() < MIN_SIZES or not noise > 0:
            continue
        x = x - x.mean()
        c = robust_parabola(x[None], y[None], np.ones((1, len(x)), dtype=bool), noise)[0]
        found.append(part.assign(deviations=(y - np.polyval(c[::-1], x)) / noise))
    columns = ["row", "flops", "n", "loss", "deviations"]
    if not found:
        return pd.DataFrame(columns=columns)
    far = pd.concat(found)
    return far.loc[far["deviations"].abs() > _OUTLIER, columns].reset_index(drop=True)


def _about(points: pd.DataFrame, law: Array | None) -> pd.DataFrame:
    """Return the points with column about: the loss, less the law's, over the budget's mean."""
    sizes = {name: points[name].to_numpy() for name in ("n", "d")}
    expected = 0.0 if law is None else CHINCHILLA.predict(law, sizes)
    mean = points.groupby("budget")["loss"].transform("mean")
    return points.assign(about=(points["loss"] - expected) / mean)
