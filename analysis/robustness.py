"""Robustness of a fit: profiles of each parameter, and the sensitivity to choices of the analyst.

A profile fixes one parameter and fits the others again. The rise of the objective, scaled as
Huber's likelihood-ratio statistic, is chi-square with one degree of freedom; where it stays below
3.84 the data allow that value. If it never rises, the parameter is not determined: a flat valley.

Source: Huber and Ronchetti, Robust Statistics, section 7.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.fit import Fit, fit
from analysis.law import Array, huber_objective
from analysis.minimise import minimise

_POINTS = 41
_SPANS = 6.0  # standard errors to either side


def profiles(fitted: Fit) -> pd.DataFrame:
    """Return columns parameter, value, statistic: a row for each fixed value of each parameter."""
    law = fitted.law
    at = law.bind({name: fitted.used[name].to_numpy() for name in law.columns})
    target = law.response(fitted.used["loss"].to_numpy())
    spread = (
        fitted.draws.std(axis=0, ddof=1)
        if len(fitted.draws) > 1
        else np.full(len(fitted.theta), np.nan)
    )
    spread = np.where(np.isfinite(spread) & (spread > 0), spread, 0.1)
    count = len(fitted.theta)
    shifts = np.linspace(-_SPANS, _SPANS, _POINTS)
    fixed = np.repeat(np.arange(count), _POINTS)
    starts = np.tile(fitted.theta, (count * _POINTS, 1))
    starts[np.arange(len(starts)), fixed] += np.tile(shifts, count) * spread[fixed]

    def objective(theta: Array, rows: NDArray[np.intp]) -> tuple[Array, Array]:
        value, gradient = huber_objective(at, theta, target, None, fitted.delta)
        gradient[np.arange(len(rows)), fixed[rows]] = 0.0
        return value, gradient

    ends, values, _ = minimise(objective, starts)
    scale = _scale(at(fitted.theta[None])[0][0] - target, fitted.delta)
    statistic = 2 * np.maximum(0.0, values - fitted.objective) / scale
    named = law.named(ends)
    value = np.concatenate([named[name][fixed == i] for i, name in enumerate(law.parameters)])
    return pd.DataFrame(
        {"parameter": np.array(law.parameters)[fixed], "value": value, "statistic": statistic}
    )


def flat_valleys(profile: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Return the interval that the profile of each parameter allows.

    Columns: parameter, low, high, flat (an end is open; it is then the last value tried).
    """
    most = stats.chi2.ppf(confidence, 1)
    rows = []
    for name, part in profile.groupby("parameter", sort=False):
        value, statistic = part["value"].to_numpy(), part["statistic"].to_numpy()
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

    Columns: choice, points (their number), the parameters of the law.

    Args:
        table, columns, loss, holdout: as given to the fit; also_n: other columns for n.
    """
    grid = fitted.law.start_grid()
    starts = np.concatenate([fitted.theta[None], grid[:: max(1, len(grid) // 20)]])

    def row(
        choice: str, rows: pd.DataFrame, names: dict[str, str], delta: float
    ) -> dict[str, object]:
        refitted = fit(
            rows,
            fitted.law,
            columns=names,
            loss=loss,
            holdout=holdout,
            delta=delta,
            bootstraps=0,
            starts=starts,
        )
        named = {k: float(v) for k, v in refitted.law.named(refitted.theta).items()}
        return {"choice": choice, "points": len(refitted.used)} | named

    rows = [row("as fitted", table, columns, fitted.delta)]
    rows += [
        row(f"delta {delta:g}", table, columns, delta)
        for delta in (1e-4, 1e-2, 1.0)
        if delta != fitted.delta
    ]
    order = pd.to_numeric(table[loss], errors="coerce").sort_values()
    for count in sorted({max(1, round(share * len(table))) for share in (0.05, 0.1)}):
        if len(table) - count > len(fitted.law.parameters):
            for name, left in (("highest", order.index[:-count]), ("lowest", order.index[count:])):
                choice = f"without the {count} {name} losses"
                rows.append(row(choice, table.loc[left], columns, fitted.delta))
    for other in also_n or []:
        rows.append(row(f"n = {other}", table, columns | {"n": other}, fitted.delta))
    return pd.DataFrame(rows)


def _scale(residual: Array, delta: float) -> float:
    """Return the divisor of twice the rise: E[psi^2] / E[psi'] of Huber's psi."""
    slope = np.clip(residual, -delta, delta)
    return float(
        np.mean(slope**2) / max(float(np.mean(np.abs(residual) <= delta)), 1 / len(residual))
    )


def _crossing(value: Array, statistic: Array, first: int, level: float) -> float:
    """Return where the profile crosses `level` between points `first` and `first` + 1."""
    a, b = statistic[first], statistic[first + 1]
    return float(value[first] + (level - a) / (b - a) * (value[first + 1] - value[first]))
