"""How far the exponent of a lower envelope is off: its bias, and its deviations on noisy copies.

A Chinchilla law is fitted to the smoothed curves where they are near the envelope. Curves that
follow it exactly have a known exponent, and so have their noisy copies: each run has an error of
its own, estimated from whole curves about the law, and each point one, from second differences.

Shape legend: B = copies, R = runs, G = budgets, M = logged points of a run.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 6.5; Gasser, Sroka
and Jennen-Steinmetz, Biometrika 73 (1986), for second differences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.budgets import fitted_law
from analysis.law import Array
from analysis.laws import CHINCHILLA

Smooth = Callable[[Array, Array], Array]  # log FLOPs [M], losses [M, B] -> [G, B], NaN outside
Exponents = Callable[[Array], Array]  # losses [B, R, G] -> exponents of the best n [B], NaN: none
_NEAR = 1.1  # times the envelope: where the law must hold
_PER_RUN = 24  # points of a curve that the law is fitted to
_LOST = 0.2  # of the copies may have no exponent
_SHAPE = 3  # parameters of the law that whole curves determine: A, alpha and E


@dataclass(frozen=True)
class Curve:
    """The size of a run, log FLOPs [M] and loss [M] of its logged points."""

    n: float
    x: Array
    y: Array

    def exact(self, theta: Array) -> "Curve":
        """Return the curve of the same points that a Chinchilla law has."""
        flops = np.exp(self.x)
        sizes = {"n": np.full(len(flops), self.n), "d": flops / (6 * self.n)}
        return Curve(self.n, self.x, CHINCHILLA.predict(theta, sizes))

    def noise(self, inside: NDArray[np.bool_]) -> float:
        """Return the standard deviation of a logged loss about a smooth curve, NaN if too few."""
        x, y = self.x[inside], self.y[inside]
        if len(x) < 3:
            return float("nan")
        share = (x[2:] - x[1:-1]) / np.maximum(x[2:] - x[:-2], 1e-300)
        gaps = share * y[:-2] + (1 - share) * y[2:] - y[1:-1]
        return float(np.sqrt(np.mean(gaps**2 / (1 + share**2 + (1 - share) ** 2))))


def bias_and_deviations(
    curves: list[Curve],
    log_c: Array,
    smooth: Smooth,
    exponents: Exponents,
    bootstraps: int,
    seed: int,
) -> tuple[float, Array]:
    """Return the bias of the exponent of n and its deviations on copies [at most B].

    They are NaN and empty where they are not known: no law fits the curves, too few runs tell how
    runs differ, or many copies have no exponent.

    Args:
        log_c: log FLOPs at which `smooth` reads a curve [G].
    """
    lines = np.stack([smooth(c.x, c.y[:, None])[:, 0] for c in curves])
    with np.errstate(invalid="ignore"):
        near = lines <= _NEAR * np.nanmin(lines, axis=0)
    points = _points(curves, lines, near, log_c)
    theta = _law(points)
    free = len(curves) - _SHAPE
    if theta is None or free < 1:
        return float("nan"), np.empty(0)
    exact = [curve.exact(theta) for curve in curves]
    still = np.stack([smooth(c.x, c.y[:, None])[:, 0] for c in exact])
    named = {name: float(value) for name, value in CHINCHILLA.named(theta).items()}
    true = named["beta"] / (named["alpha"] + named["beta"])
    bias = float(exponents(still[None])[0]) - true
    of_run, of_point = _spreads(curves, lines - still, near, log_c, free)
    rng = np.random.default_rng(seed)
    wide = of_run * np.sqrt(free / rng.chisquare(free, bootstraps))
    copies = still + (wide[:, None] * rng.standard_normal((bootstraps, len(curves))))[:, :, None]
    for index, curve in enumerate(curves):
        errors = of_point * rng.standard_normal((len(curve.x), bootstraps))
        copies[:, index] += smooth(curve.x, errors).T
    found = exponents(copies) - true - bias
    found = found[np.isfinite(found)]
    if not np.isfinite(bias) or len(found) < (1 - _LOST) * bootstraps:
        return float("nan"), np.empty(0)
    return bias, found


def _points(
    curves: list[Curve], lines: Array, near: NDArray[np.bool_], log_c: Array
) -> pd.DataFrame:
    """Return points of the smoothed curves near the envelope: columns n, d, loss."""
    rows = []
    for curve, line, inside in zip(curves, lines, near, strict=True):
        chosen = np.flatnonzero(inside)
        chosen = chosen[:: max(1, len(chosen) // _PER_RUN)]
        d = np.exp(log_c[chosen]) / (6 * curve.n)
        rows.append(pd.DataFrame({"n": curve.n, "d": d, "loss": line[chosen]}))
    return pd.concat(rows, ignore_index=True)


def _law(points: pd.DataFrame) -> Array | None:
    """Return the parameters of a Chinchilla law, None where there is none within its bounds."""
    if points["n"].nunique() < _SHAPE:
        return None
    theta = fitted_law(points)
    return None if theta is None or CHINCHILLA.at_bound(theta) else theta


def _spreads(
    curves: list[Curve], residual: Array, near: NDArray[np.bool_], log_c: Array, free: int
) -> tuple[float, float]:
    """Return the standard deviations of the error of a run and of a logged point."""
    means, variances, of_means = [], [], []
    for curve, left, inside in zip(curves, residual, near, strict=True):
        if not inside.any():
            continue
        means.append(left[inside].mean())
        ends = log_c[inside][[0, -1]]
        logged = (curve.x >= ends[0]) & (curve.x <= ends[1])
        variance = curve.noise(logged) ** 2
        variances.append(variance)
        of_means.append(variance / max(1, int(logged.sum())))
    of_point = float(np.nan_to_num(np.nanmedian(variances)))
    of_runs = float(np.square(means).sum()) / free - float(np.nan_to_num(np.nanmean(of_means)))
    return float(np.sqrt(max(0.0, of_runs))), float(np.sqrt(of_point))
