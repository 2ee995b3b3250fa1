"""Tables of runs whose law is known."""

import numpy as np
import pandas as pd

from analysis.law import Array
from analysis.laws import CHINCHILLA

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
THETA: Array = CHINCHILLA.theta({name: np.array(value) for name, value in TRUE.items()})
EXPONENT = TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"])  # of the best n in C


def grid(noise: float = 0.0, seeds: int = 1) -> pd.DataFrame:
    """Return 8 x 8 sizes and tokens: columns n, d, flops, seed, loss."""
    n, d, seed = (
        v.ravel()
        for v in np.meshgrid(
            np.geomspace(1e7, 1e10, 8), np.geomspace(1e9, 1e12, 8), np.arange(seeds)
        )
    )
    return _with_loss(pd.DataFrame({"n": n, "d": d, "flops": 6 * n * d, "seed": seed}), noise)


def budgets(noise: float = 0.0, sizes: int = 7, seeds: int = 2) -> pd.DataFrame:
    """Return 4 budgets, each with sizes around its best."""
    rows = []
    for flops in np.geomspace(1e18, 1e21, 4):
        a, b, alpha, beta = (TRUE[k] for k in ("A", "B", "alpha", "beta"))
        best = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** EXPONENT
        rows += [
            (flops, best * f, seed) for f in np.geomspace(0.2, 5.0, sizes) for seed in range(seeds)
        ]
    table = pd.DataFrame(rows, columns=["flops", "n", "seed"])
    return _with_loss(table.assign(d=table["flops"] / (6 * table["n"])), noise)


def curves(sizes: int, points: int) -> pd.DataFrame:
    """Return training curves that follow the law: columns run, n, d, flops, loss."""
    n, d = (
        v.ravel()
        for v in np.meshgrid(np.geomspace(1e7, 1e10, sizes), np.geomspace(1e8, 1e12, points))
    )
    table = pd.DataFrame({"n": n, "d": d, "flops": 6 * n * d})
    return _with_loss(table.assign(run=table["n"].rank(method="dense")), 0.0)


def _with_loss(table: pd.DataFrame, noise: float) -> pd.DataFrame:
    exact = CHINCHILLA.predict(THETA, {"n": table["n"].to_numpy(), "d": table["d"].to_numpy()})
    error = np.random.default_rng(0).normal(0.0, noise, len(table))
    return table.assign(loss=exact * np.exp(error))
