"""The size of smallest loss at one budget, for many noisy copies of the losses at once.

The parabola sees only sizes within a window around the minimum: a loss curve is steeper on one side
than on the other, and far sizes would pull the minimum towards the flat one.

Shape legend: B = copies of the losses, M = runs, G = sizes.

Source: Hoffmann et al. arXiv 2203.15556, approach 2; Huber, Robust Statistics, for the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator

from analysis.law import Array

MIN_SIZES = 4  # three always lie on a parabola
_WINDOW_SIZES = 5  # in the window at least
_WINDOW = np.log(4.0)  # to either side of the minimum
_HUBER = 1.345  # standard deviations: 95% efficient for normal noise
_CONVERGED = 1e-3  # change of a weight of 1: nothing beside the noise
_GRID = 2001
_REASONS = ("", "the parabola opens downwards", "the minimum lies outside the sizes")


@dataclass(frozen=True)
class Minima:
    """The minimum of each copy.

    Args:
        best: logarithm of the size, NaN where there is none [B]; loss: there [B].
        why: index of the reason why there is none, 0 where there is one [B].
        curve: the fitted curve of the first copy; reach: the smallest and largest log size of it.
    """

    best: Array
    loss: Array
    why: NDArray[np.intp]
    curve: Callable[[Array], Array]
    reach: tuple[float, float]

    @property
    def reason(self) -> str:
        """Why the first copy has no minimum, "" if it has one."""
        return _REASONS[int(self.why[0])]


Find = Callable[[Array, Array, float], Minima]


def parabola(x: Array, y: Array, noise: float) -> Minima:
    """Return the minima of robust parabolas through the runs of a window.

    Args:
        x: log sizes [M]; y: losses [B, M]; noise: standard deviation of a run, which tells what an
            outlier is.
    """
    sizes, means = _means(x, y)
    padded = np.pad(means, ((0, 0), (1, 1)), mode="edge")
    smooth = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
    centre = sizes[1:-1][np.argmin(smooth[:, 1:-1], axis=1)]
    for _ in range(3):
        distance = np.sort(np.abs(sizes - centre[:, None]), axis=1)
        width = distance[:, min(_WINDOW_SIZES, len(sizes)) - 1]
        reach = np.maximum(width, _WINDOW)[:, None] + 1e-9
        inside = np.abs(x - centre[:, None]) <= reach
        c = robust_parabola(x - centre[:, None], y, inside, noise)
        with np.errstate(all="ignore"):
            shift = np.where(c[:, 2] > 0, -c[:, 1] / (2 * c[:, 2]), 0.0)
        first, centre = centre, np.clip(centre + shift, sizes[0], sizes[-1])
    best = first + shift
    why = np.where(c[:, 2] <= 0, 1, np.where((best <= sizes[0]) | (best >= sizes[-1]), 2, 0))
    with np.errstate(all="ignore"):
        loss = c[:, 0] - c[:, 1] ** 2 / (4 * c[:, 2])

    def curve(line: Array) -> Array:
        return np.asarray(np.polyval(c[0, ::-1], line - first[0]))

    shown = x[inside[0]]
    ends = float(shown.min()), float(shown.max())
    return Minima(np.where(why == 0, best, np.nan), loss, why, curve, ends)


def akima(x: Array, y: Array, noise: float) -> Minima:
    """Return the minima of splines through the mean of each size; `noise` is not used."""
    del noise
    sizes, means = _means(x, y)
    line = np.linspace(sizes[0], sizes[-1], _GRID)
    spline = Akima1DInterpolator(sizes, means.T)
    values = spline(line)
    lowest = np.argmin(values, axis=0)
    why = np.where((lowest == 0) | (lowest == _GRID - 1), 2, 0)
    best, loss = line[lowest], values[lowest, np.arange(len(y))]
    return Minima(
        np.where(why == 0, best, np.nan),
        loss,
        why,
        lambda at: np.asarray(spline(at))[:, 0],
        (float(sizes[0]), float(sizes[-1])),
    )


METHODS: dict[str, Find] = {"parabola": parabola, "akima": akima}


def _means(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the sizes [G] and the mean loss of each [B, G]."""
    sizes, code = np.unique(x, return_inverse=True)
    share = np.zeros((len(x), len(sizes)))
    share[np.arange(len(x)), code] = 1.0
    return sizes, y @ (share / share.sum(axis=0))


def robust_parabola(x: Array, y: Array, inside: NDArray[np.bool_], noise: float) -> Array:
    """Return the coefficients [B, 3] of Huber's parabola through the runs `inside` [B, M]."""
    design = np.stack([np.ones_like(x), x, x**2], axis=2)  # [B, M, 3]
    weights = inside.astype(float)
    for _ in range(10):
        weighted = design * weights[:, :, None]
        turned = weighted.transpose(0, 2, 1)
        c: Array = np.linalg.solve(turned @ design, turned @ y[:, :, None])[:, :, 0]
        residual = np.abs(y - (design @ c[:, :, None])[:, :, 0])
        before = weights
        if noise > 0:
            weights = inside * np.minimum(1.0, _HUBER * noise / np.maximum(residual, 1e-300))
        if np.abs(weights - before).max() < _CONVERGED:
            break
    return c
