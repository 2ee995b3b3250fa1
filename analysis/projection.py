"""The Chinchilla law by variable projection: only the exponents are searched, the rest is linear.

For given alpha and beta the best E, A, B >= 0 solve a non-negative least-squares problem, which has
one solution; so the search is over two numbers, and no coefficient can become negative. It
minimises squared relative errors: a check of the Huber fit, not the same estimate.

Source: Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973); Lawson and Hanson's NNLS from SciPy;
Bates and Watts, Nonlinear Regression Analysis (1988), section 2.3, for the intervals.
"""

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import minimize, nnls

from analysis.law import Array

_BOUNDS = [(0.0, 3.0)] * 2  # of the exponents, as of the law
_GRID = np.linspace(0.05, 1.05, 11)


def variable_projection(n: Array, d: Array, loss: Array) -> pd.DataFrame:
    """Return a row for each of A, B, E, alpha, beta: estimate, se, low, high (95%), at_bound.

    The intervals are those of the law linearised at the estimate, with Student's t, in logarithms
    of A and B. They are NaN where the points do not determine the parameters: one is at a bound,
    the interval of an exponent reaches beyond one, or there are no more points than parameters.

    Args:
        n, d, loss: the points [M], positive.
    """
    logs = np.log(n), np.log(d)
    best = _search(*logs, loss, [(a, b) for a in _GRID for b in _GRID])
    names = ("A", "B", "E", "alpha", "beta")
    parameters = pd.DataFrame({"parameter": names, "estimate": best})
    parameters["at_bound"] = (best <= 0) | (np.array([0, 0, 0, *best[3:]]) >= _BOUNDS[0][1])
    deviation, free = np.full(5, np.nan), len(loss) - 5
    if free > 0 and not parameters["at_bound"].any():
        deviation = _deviations(*logs, loss, best)
    positive = np.array([True, True, False, False, False])
    half = stats.t.ppf(0.975, max(1, free)) * deviation
    reach = best[3:, None] + half[3:, None] * np.array([-1.0, 1.0])
    if not (reach == np.clip(reach, *_BOUNDS[0])).all():
        deviation, half = np.full(5, np.nan), np.full(5, np.nan)
    parameters.insert(2, "se", np.where(positive, best * deviation, deviation))
    parameters.insert(3, "low", np.where(positive, best * np.exp(-half), best - half))
    parameters.insert(4, "high", np.where(positive, best * np.exp(half), best + half))
    return parameters


def _deviations(n: Array, d: Array, loss: Array, best: Array) -> Array:
    """Return standard deviations of log A, log B, E, alpha, beta [5] by the law's slopes there."""
    a, b = best[0] * np.exp(-best[3] * n), best[1] * np.exp(-best[4] * d)
    slopes = np.stack([a, b, np.ones_like(n), -a * n, -b * d], axis=1) / loss[:, None]
    residual = (a + b + best[2]) / loss - 1
    _, singular, axes = np.linalg.svd(slopes / np.linalg.norm(slopes, axis=0))
    with np.errstate(divide="ignore"):
        axes = axes / singular[:, None]
    variance = np.square(axes).sum(axis=0) / np.square(slopes).sum(axis=0)
    result: Array = np.sqrt(variance * (residual @ residual) / (len(loss) - 5))
    return result


def _search(n: Array, d: Array, loss: Array, starts: list[tuple[float, float]]) -> Array:
    middle = np.array([n.mean(), d.mean()])  # coefficients of order one

    def solved(exponents: Array) -> tuple[float, Array]:
        columns = [
            np.exp(-exponents[0] * (n - middle[0])),
            np.exp(-exponents[1] * (d - middle[1])),
            np.ones_like(n),
        ]
        coefficients, norm = nnls(np.stack(columns, axis=1) / loss[:, None], np.ones_like(loss))
        return norm**2, coefficients

    first = min(starts, key=lambda start: solved(np.array(start))[0])
    least = 1e-12 * solved(np.array(first))[0]
    options = {"xatol": 1e-9, "fatol": max(least, 1e-300), "maxiter": 2000}
    end = minimize(  # type: ignore[call-overload]
        lambda exponents: solved(exponents)[0],
        np.array(first),
        method="Nelder-Mead",
        bounds=_BOUNDS,
        options=options,
    ).x
    a, b, e = solved(end)[1]
    scaled = a * np.exp(end[0] * middle[0]), b * np.exp(end[1] * middle[1])
    return np.array([*scaled, e, *end])
