"""Tables of runs whose law is known."""

import numpy as np
import pandas as pd

from analysis.law import Array
from analysis.laws import CHINCHILLA

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
THETA: Array = CHINCHILLA.theta({name: np.array(value) for name, value in TRUE.items()})
EXPONENT = TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"])  # of the best n in C


def grid(noise: float = 0.0, seeds: int = 1, draw: int = 0, *, side: int = 8) -> pd.DataFrame:
    """Return 8 x 8 (side x side) sizes and tokens: columns n, d, flops, seed, loss."""
    n, d, seed = (
        v.ravel()
        for v in np.meshgrid(
            np.geomspace(1e7, 1e10, side), np.geomspace(1e9, 1e12, side), np.arange(seeds)
        )
    )
    return _with_loss(pd.DataFrame({"n": n, "d": d, "flops": 6 * n * d, "seed": seed}), noise, draw)


def best_size(flops: Array) -> Array:
    """Return the compute-optimal n."""
    a, b, alpha, beta = (TRUE[k] for k in ("A", "B", "alpha", "beta"))
    best: Array = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** EXPONENT
    return best


def budgets(
    noise: float = 0.0,
    sizes: int = 7,
    seeds: int = 2,
    *,
    count: int = 4,
    span: float = 5.0,
    off: float = 1.0,
    draw: int = 0,
) -> pd.DataFrame:
    """Return budgets from 1e18 to 1e21 FLOPs, each with sizes from 1 / span to span of its best.

    Args:
        off: a factor by which all sizes are too large; draw: of the noise.
    """
    flops, factor, seed = (
        v.ravel()
        for v in np.meshgrid(
            np.geomspace(1e18, 1e21, count),
            np.geomspace(1 / span, span, sizes) * off,
            np.arange(seeds),
            indexing="ij",
        )
    )
    n = best_size(flops) * factor
    table = pd.DataFrame({"flops": flops, "n": n, "seed": seed, "d": flops / (6 * n)})
    return _with_loss(table, noise, draw)


def curves(sizes: int, points: int) -> pd.DataFrame:
    """Return training curves that follow the law: columns run, n, d, flops, loss."""
    n, d = (
        v.ravel()
        for v in np.meshgrid(np.geomspace(1e7, 1e10, sizes), np.geomspace(1e8, 1e12, points))
    )
    table = pd.DataFrame({"n": n, "d": d, "flops": 6 * n * d})
    return _with_loss(table.assign(run=table["n"].rank(method="dense")), 0.0)


def _with_loss(table: pd.DataFrame, noise: float, draw: int = 0) -> pd.DataFrame:
    exact = CHINCHILLA.predict(THETA, {"n": table["n"].to_numpy(), "d": table["d"].to_numpy()})
    error = np.random.default_rng(draw).normal(0.0, noise, len(table))
    return table.assign(loss=exact * np.exp(error))
