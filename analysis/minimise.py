"""BFGS for thousands of small problems at once: every start and every bootstrap is a row.

The line search brackets weak Wolfe points (Lewis and Overton, Math. Programming 141, 2013), which
also serves objectives that are nearly kinked, as a Huber loss with a small delta is. Rows that have
converged are taken out of the batch.

Shape legend: S = problems, P = parameters.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Objective = Callable[[Array, NDArray[np.intp]], tuple[Array, Array]]
_ARMIJO, _WOLFE = 1e-4, 0.9
_HALVINGS = 40


def minimise(
    objective: Objective,
    starts: Array,
    *,
    inverse: Array | None = None,
    watch: Callable[[int], None] | None = None,
    tolerance: float = 1e-12,
    floor: float = 1e-300,
    max_iterations: int = 2000,
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return the minima [S, P] reached from `starts`, their values [S], and which have converged.

    Args:
        objective: takes parameters [s, P] and the problems' indices [s]; returns values [s] and
            gradients [s, P].
        inverse: estimates of the inverse Hessians at the starts [S, P, P]; None: none is known.
        watch: called at each iteration with the number of rows that have not converged.
        tolerance: a row is done when a step gains less than this, relative, three times running.
        floor: the least value that a gain is relative to; of a row that falls to 0 none is small.
        max_iterations: rows that need more are not converged.
    """
    x = starts.astype(float).copy()
    problems, size = x.shape
    rows = np.arange(problems)
    value, slope = objective(x, rows)
    fresh = np.full(problems, inverse is None)  # its inverse Hessian has no scale yet
    inverse = np.tile(np.eye(size), (problems, 1, 1)) if inverse is None else inverse.copy()
    idle = np.zeros(problems, dtype=int)
    live = rows[np.isfinite(value)]
    for _ in range(max_iterations):
        if watch:
            watch(len(live))
        if not len(live):
            break
        g = slope[live]
        direction = -np.einsum("spq,sq->sp", inverse[live], g)
        along = np.einsum("sp,sp->s", direction, g)
        bad = ~(along < 0)
        if bad.any():
            inverse[live[bad]] = np.eye(size)
            fresh[live[bad]] = True
            direction[bad], along[bad] = -g[bad], -np.square(g[bad]).sum(axis=1)
        first = np.where(fresh[live], 1.0 / np.maximum(1.0, np.abs(direction).sum(axis=1)), 1.0)
        step, new_value, new_slope = _search(
            objective, live, x[live], direction, along, value[live], g, first
        )
        s, y = step[:, None] * direction, new_slope - g
        gained = value[live] - new_value
        x[live] += s
        value[live], slope[live] = new_value, new_slope
        _update(inverse, fresh, live, s, y)
        small = gained <= tolerance * np.maximum(np.abs(new_value), floor)
        idle[live] = np.where(small, idle[live] + 1, 0)
        stuck = step == 0.0
        inverse[live[stuck]] = np.eye(size)
        fresh[live[stuck]] = True
        live = live[(idle[live] < 3) & np.isfinite(new_value)]
    return x, value, idle >= 3


def _search(
    objective: Objective,
    rows: NDArray[np.intp],
    x: Array,
    direction: Array,
    along: Array,
    value: Array,
    slope: Array,
    first: Array,
) -> tuple[Array, Array, Array]:
    """Return (steps to weak Wolfe points, 0 where there is none; values and gradients there)."""
    count = len(rows)
    low, high, step = np.zeros(count), np.full(count, np.inf), first.copy()
    best, best_value, best_slope = np.zeros(count), value.copy(), slope.copy()
    open_ = np.arange(count)
    for _ in range(_HALVINGS):
        point = x[open_] + step[open_, None] * direction[open_]
        trial, gradient = objective(point, rows[open_])
        enough = trial <= value[open_] + _ARMIJO * step[open_] * along[open_]
        enough &= np.isfinite(trial)
        flat = np.einsum("sp,sp->s", gradient, direction[open_]) >= _WOLFE * along[open_]
        taken = open_[enough]
        best[taken], best_value[taken], best_slope[taken] = (
            step[taken],
            trial[enough],
            gradient[enough],
        )
        high[open_[~enough]] = step[open_[~enough]]
        low[taken] = step[taken]
        open_ = open_[~(enough & flat)]
        if not len(open_):
            break
        bracketed = np.isfinite(high[open_])
        middle = 0.5 * (low[open_] + np.where(bracketed, high[open_], 0.0))
        step[open_] = np.where(bracketed, middle, 2.0 * step[open_])
    return best, best_value, best_slope


def _update(
    inverse: Array, fresh: NDArray[np.bool_], rows: NDArray[np.intp], s: Array, y: Array
) -> None:
    """Enter the steps `s` and the changes `y` of the gradient into the inverse Hessians."""
    curve = np.einsum("sp,sp->s", s, y)
    good = curve > 1e-300
    rows, s, y, curve = rows[good], s[good], y[good], curve[good]
    new = fresh[rows]
    scale = curve[new] / np.square(y[new]).sum(axis=1)
    inverse[rows[new]] *= scale[:, None, None]
    fresh[rows] = False
    h = inverse[rows]
    hy = np.einsum("spq,sq->sp", h, y)
    factor = (1.0 + np.einsum("sp,sp->s", y, hy) / curve) / curve
    outer = np.einsum("sp,sq->spq", hy, s) / curve[:, None, None]
    inverse[rows] = (
        h + factor[:, None, None] * np.einsum("sp,sq->spq", s, s) - outer - outer.transpose(0, 2, 1)
    )
