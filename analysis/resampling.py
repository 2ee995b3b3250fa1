"""Where a fit starts, and its bootstraps: runs drawn with replacement, fitted from several starts.

A bootstrap that starts at the best parameters alone stays in their basin, and where a valley is
flat it stays at one point of it: its interval is then far too short. So each one starts from all
distinct parameters that the data allow, and where several ends are equally good one is drawn.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.law import Array
from analysis.minimise import minimise
from analysis.objective import Objective

Progress = Callable[[str, int, int], None]  # what is done, how many of how many
_SCREENED = 512  # points from which starts are tried when there are many more
_DISTINCT = 0.3  # difference of a logarithm or an exponent between ends that are not the same
_POLISHED = 12  # ends of the screening that are fitted to all points
_STARTS = 8  # of a bootstrap, at most
_CONFIDENCE = 0.99  # that the data allow a start
_SAME = 1e-6  # relative: objectives so close are equally good
_PRECISION = 1e-9  # of a bootstrap's objective: 0.3% of a standard error with 10,000 points
_VALUES = 4_000_000  # weights in memory at once


def search(
    objective: Objective, starts: Array, progress: Progress
) -> tuple[Array, Array, Array, Array]:
    """Return where a fit ends from each start.

    With many points the starts are tried on some of them, and the distinct ends fitted to all.

    Returns:
        ends [E, P] and their objectives [E] on all points, the best first; the objective that each
        start reached [S]; those of `ends` that the data allow, distinct, the best first [K, P].
    """
    points = objective.points
    if len(points) > _SCREENED:
        rows = np.random.default_rng(0).choice(len(points), _SCREENED, replace=False)
        few = Objective(objective.law, points.iloc[np.sort(rows)], objective.delta)
        tried, reached = _minimise(few, starts, progress, "starts, on some points")
        first = _apart(tried[np.argsort(reached)], _POLISHED)
        ends, values = _minimise(objective, first, progress, "best starts, on all points")
    else:
        ends, values = _minimise(objective, starts, progress, "starts")
        reached = values
    order = np.argsort(values)
    ends, values = ends[order], values[order]
    limit = stats.chi2.ppf(_CONFIDENCE, ends.shape[1]) * objective.scale(ends[0]) / 2
    allowed = ends[values <= values[0] + limit]
    return ends, values, reached, _spread(allowed, _STARTS)


def bootstrap(
    objective: Objective,
    starts: Array,
    clusters: NDArray[np.intp],
    bootstraps: int,
    seed: int,
    progress: Progress,
) -> Array:
    """Return the parameters [B, P] fitted to resampled clusters, each from all `starts` [K, P].

    Args:
        clusters: the number of each point's cluster [M]; points of one are drawn together.
    """
    generator, ties = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    _, code = np.unique(clusters, return_inverse=True)
    count = int(code.max()) + 1
    many = len(starts)
    least = max(float(objective(starts[:1])[0][0]), 1e-300)
    metrics = np.stack([objective.inverse_curvature(start) for start in starts])
    draws = np.empty((bootstraps, starts.shape[1]))
    chunk = max(1, _VALUES // len(code) // many)
    for first in range(0, bootstraps, chunk):
        size = min(chunk, bootstraps - first)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
        weights = drawn[:, code].astype(float)
        ends, values, _ = minimise(
            lambda theta, rows, w=weights: objective(theta, w[rows // many]),  # type: ignore[misc]
            np.tile(starts, (size, 1)),
            inverse=np.tile(metrics, (size, 1, 1)),
            floor=least,
            tolerance=_PRECISION,
            watch=lambda live, f=first, s=size: progress(  # type: ignore[misc]
                "bootstraps", f + s - live // many, bootstraps
            ),
        )
        values = np.where(np.isfinite(values), values, np.inf).reshape(size, many)
        good = values <= values.min(axis=1, keepdims=True) * (1 + _SAME) + 1e-15
        chosen = np.argmax(good * ties.random(good.shape), axis=1)
        draws[first : first + size] = ends.reshape(size, many, -1)[np.arange(size), chosen]
    return draws


def _minimise(
    objective: Objective, starts: Array, progress: Progress, stage: str
) -> tuple[Array, Array]:
    ends, values, _ = minimise(
        lambda theta, _: objective(theta),
        starts,
        watch=lambda live: progress(stage, len(starts) - live, len(starts)),
    )
    return ends, np.where(np.isfinite(values), values, np.inf)


def _apart(ends: Array, count: int) -> Array:
    """Return the first of `ends` that differ from all before them, `count` at most."""
    kept = ends[:1]
    for end in ends[1:]:
        if len(kept) == count:
            break
        if _distance(kept, end).min() > _DISTINCT:
            kept = np.concatenate([kept, end[None]])
    return kept


def _spread(ends: Array, count: int) -> Array:
    """Return the first of `ends` and those farthest from all that were taken before."""
    kept, nearest = ends[:1], _distance(ends, ends[0])
    while len(kept) < count and nearest.max() > _DISTINCT:
        kept = np.concatenate([kept, ends[[np.argmax(nearest)]]])
        nearest = np.minimum(nearest, _distance(ends, kept[-1]))
    return kept


def _distance(ends: Array, end: Array) -> Array:
    """Return the largest difference of a parameter; what has vanished is not far for ever."""
    distance: Array = np.minimum(np.abs(ends - end), 10.0).max(axis=1)
    return distance
