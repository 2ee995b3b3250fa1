"""Robustness of a fit: profiles of each parameter, and the sensitivity to choices of the analyst.

A profile fixes one parameter and fits the others again. The rise of the objective, scaled as
Huber's likelihood-ratio statistic, is chi-square with one degree of freedom; where it stays below
3.84 the data allow that value. With few points it is reduced as Student's t asks. If it never
rises, the parameter is not determined: a flat valley.

Source: Huber and Ronchetti, Robust Statistics, section 7.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.expressions import true_rows
from analysis.fit import Fit, fit
from analysis.law import Array
from analysis.minimise import minimise
from analysis.objective import Objective

_POINTS = 41
_STUCK = 1e-6  # of the objective: a neighbour's end that is better by more shows a missed minimum
_SPANS = 6.0  # standard errors to either side


def profiles(fitted: Fit) -> pd.DataFrame:
    """Return columns parameter, value, statistic: a row for each fixed value of each parameter.

    A statistic below zero is a better fit than the one found: the starts have missed the minimum.
    """
    law, of_points = fitted.law, Objective(fitted.law, fitted.used, fitted.delta)
    count = len(fitted.theta)
    spread = np.full(count, 0.1)
    if len(fitted.draws) > 1:
        below, above = np.quantile(fitted.draws, [0.16, 0.84], axis=0)
        spread = np.where(above > below, (above - below) / 2, spread)
    shifts = np.linspace(-_SPANS, _SPANS, _POINTS)
    fixed = np.repeat(np.arange(count), _POINTS)
    starts = np.tile(fitted.theta, (count * _POINTS, 1))
    moved = fitted.theta[fixed] + np.tile(shifts, count) * spread[fixed]
    low, high = of_points.walls
    starts[np.arange(len(starts)), fixed] = np.clip(moved, low[fixed], high[fixed])

    def objective(theta: Array, rows: NDArray[np.intp]) -> tuple[Array, Array]:
        value, gradient = of_points(theta)
        gradient[np.arange(len(rows)), fixed[rows]] = 0.0
        return value, gradient

    metric = _metrics_without_one(of_points.inverse_curvature(fitted.theta))[fixed]
    ends, values, _ = minimise(objective, starts, inverse=metric)
    ends, values = _from_neighbours(objective, ends, values, metric)
    points, free = len(fitted.used), len(fitted.used) - count
    few = stats.chi2.ppf(0.95, 1) / stats.t.ppf(0.975, free) ** 2 * free / points
    statistic = 2 * few * (values - fitted.objective) / of_points.scale(fitted.theta)
    named = law.named(ends)
    value = np.concatenate([named[name][fixed == i] for i, name in enumerate(law.parameters)])
    return pd.DataFrame(
        {"parameter": np.array(law.parameters)[fixed], "value": value, "statistic": statistic}
    )


def _metrics_without_one(inverse: Array) -> Array:
    """Return, for each parameter held, the inverse Hessian of the others [P, P, P], 0 for it."""
    hessian, count = np.linalg.inv(inverse), len(inverse)
    metrics = np.zeros((count, count, count))
    for held in range(count):
        others = np.delete(np.arange(count), held)
        metrics[held][np.ix_(others, others)] = np.linalg.inv(hessian[np.ix_(others, others)])
    return metrics


def _from_neighbours(
    objective: Callable[[Array, NDArray[np.intp]], tuple[Array, Array]],
    ends: Array,
    values: Array,
    metric: Array,
) -> tuple[Array, Array]:
    """Return the ends and values, those that were stuck minimised again from a neighbour's end.

    A row is stuck if the end of a neighbour, with its own held value, is better than its own.
    """
    rows = np.arange(len(ends))
    held = rows // _POINTS
    for _ in range(_POINTS):
        again = np.zeros(len(ends), dtype=bool)
        for step in (-1, 1):
            beside = np.clip(rows + step, held * _POINTS, held * _POINTS + _POINTS - 1)
            starts = ends[beside]
            starts[rows, held] = ends[rows, held]
            found, _ = objective(starts, rows)
            better = found < values * (1 - _STUCK)
            ends, values = np.where(better[:, None], starts, ends), np.where(better, found, values)
            again |= better
        if not again.any():
            break
        chosen = np.flatnonzero(again)
        ends[chosen], values[chosen], _ = minimise(
            lambda theta, local: objective(theta, chosen[local]),  # noqa: B023
            ends[chosen],
            inverse=metric[chosen],
        )
    return ends, values


def flat_valleys(profile: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Return the interval that the profile of each parameter allows.

    Columns: parameter, low, high, flat (an end is open; it is then the last value tried).
    """
    rise = stats.chi2.ppf(confidence, 1)
    rows = []
    for name, part in profile.groupby("parameter", sort=False):
        value, statistic = part["value"].to_numpy(), part["statistic"].to_numpy()
        most = rise + min(0.0, float(np.min(statistic)))  # above the best fit, found or missed
        allowed = np.flatnonzero(statistic <= most)
        first, last = allowed[0], allowed[-1]
        low = value[0] if first == 0 else _crossing(value, statistic, first - 1, most)
        high = value[-1] if last == len(value) - 1 else _crossing(value, statistic, last, most)
        rows.append((name, low, high, bool(first == 0 or last == len(value) - 1)))
    return pd.DataFrame(rows, columns=["parameter", "low", "high", "flat"])


def sensitivity(
    table: pd.DataFrame,
    fitted: Fit,
    *,
    columns: dict[str, str],
    loss: str,
    also_n: list[str] | None = None,
    holdout: str | None = None,
) -> pd.DataFrame:
    """Return the parameters under other deltas of Huber's, without some points, with another n.

    Columns: choice, points (their number), the parameters of the law, and, if a choice cannot be
    fitted, why_not. Rows held out of the fit are in none of them.

    Args:
        table, columns, loss, holdout: as given to the fit; also_n: other columns for n.
    """
    law, grid = fitted.law, fitted.law.start_grid()
    starts = np.concatenate([fitted.theta[None], grid[:: max(1, len(grid) // 20)]])
    if holdout:
        table = table[~true_rows(table, holdout, "--holdout")]

    def row(
        choice: str, rows: pd.DataFrame, names: dict[str, str], delta: float
    ) -> dict[str, object]:
        try:
            refitted = fit(
                rows, law, columns=names, loss=loss, delta=delta, bootstraps=0, starts=starts
            )
        except (KeyError, ValueError) as error:  # the fit itself stands
            return {"choice": choice, "points": len(rows), "why_not": str(error.args[0])}
        named = {k: float(v) for k, v in law.named(refitted.theta).items()}
        return {"choice": choice, "points": len(refitted.used)} | named

    rows = [row("as fitted", table, columns, fitted.delta)]
    rows += [
        row(f"delta {delta:g}", table, columns, delta)
        for delta in (1e-4, 1e-2, 1.0)
        if delta != fitted.delta
    ]
    order = pd.to_numeric(table[loss], errors="coerce").dropna().sort_values()
    for count in sorted({max(1, round(share * len(order))) for share in (0.05, 0.1)}):
        for name, left in (("highest", order.index[:-count]), ("lowest", order.index[count:])):
            choice = f"without the {count} {name} losses"
            rows.append(row(choice, table.loc[left], columns, fitted.delta))
    for other in also_n or []:
        rows.append(row(f"n = {other}", table, columns | {"n": other}, fitted.delta))
    shown = pd.DataFrame(rows)
    names = [name for name in law.named(fitted.theta) if name in shown]
    return shown[["choice", "points", *names, *(["why_not"] if "why_not" in shown else [])]]


def _crossing(value: Array, statistic: Array, first: int, level: float) -> float:
    """Return where the profile crosses `level` between points `first` and `first` + 1."""
    a, b = statistic[first], statistic[first + 1]
    return float(value[first] + (level - a) / (b - a) * (value[first + 1] - value[first]))
