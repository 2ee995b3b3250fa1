"""The Chinchilla law by variable projection: only the exponents are searched, the rest is linear.

For given alpha and beta the best E, A, B >= 0 solve a non-negative least-squares problem, which has
one solution; so the search is over two numbers, and no coefficient can become negative. It
minimises squared relative errors: a check of the Huber fit, not the same estimate.

Source: Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973); Lawson and Hanson's NNLS from SciPy.
"""

import numpy as np
import pandas as pd
from scipy.optimize import minimize, nnls

from analysis.law import Array

_BOUNDS = [(0.0, 3.0)] * 2  # of the exponents, as of the law
_GRID = np.linspace(0.05, 1.05, 11)


def variable_projection(
    n: Array, d: Array, loss: Array, *, bootstraps: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Return a row for each of A, B, E, alpha, beta: estimate, se, low, high (95%), at_bound.

    Args:
        n, d, loss: the points [M], positive; bootstraps: resamples of them.
    """
    logs = np.log(n), np.log(d)
    best = _search(*logs, loss, [(a, b) for a in _GRID for b in _GRID])
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(bootstraps):
        rows = rng.integers(0, len(loss), len(loss))
        estimate = _search(logs[0][rows], logs[1][rows], loss[rows], [(best[3], best[4])])
        resampled.append(estimate)
    # Resampled points vary less than new ones would, by the five that the parameters take.
    few = np.sqrt(len(loss) / max(1, len(loss) - 5))
    draws = np.maximum(0.0, best + few * (np.array(resampled).reshape(-1, 5) - best))
    names = ("A", "B", "E", "alpha", "beta")
    parameters = pd.DataFrame({"parameter": names, "estimate": best})
    if bootstraps > 1:
        parameters["se"] = draws.std(axis=0, ddof=1)
        parameters["low"], parameters["high"] = np.quantile(draws, [0.025, 0.975], axis=0)
    parameters["at_bound"] = parameters["estimate"] <= 0
    return parameters


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
