"""Fitting the Chinchilla law to Epoch's points: all starts and bootstraps, ours beside a plain SciPy loop.

    PYTHONPATH=. python tests/bench/fit.py ../shared/scaling/chinchilla_epoch/svg_extracted_data.csv

SciPy runs every 50th of the starts and of the bootstraps, with the same analytic gradient, and is scaled
up: L-BFGS-B to tolerances at which most starts arrive (by default it stops early at a sum this small), BFGS
from the published start with its defaults, as the published procedure has it.
"""

import sys
import time

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from analysis.laws import CHINCHILLA, huber_objective
from analysis.minimise import minimise

EVERY = 50
TIGHT = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 15000, "maxfun": 30000}


def main(file: str) -> None:
    """Print seconds and ratios."""
    table = pd.read_csv(file)
    n, loss = table["Model Size"].to_numpy(), table["loss"].to_numpy()
    d = table["Training FLOP"].to_numpy() / (6 * n)
    kept = loss < np.sort(loss)[-5]
    features, target = CHINCHILLA.features({"n": n[kept], "d": d[kept]}), np.log(loss[kept])
    count, draws = len(target), np.random.RandomState(42)
    weights = np.stack([np.bincount(draws.choice(count, count), minlength=count) for _ in range(4000)]).astype(float)  # fmt: skip
    ones = np.ones((1, count))
    tasks = {
        "4,500 starts": (CHINCHILLA.start_grid(), None, "L-BFGS-B", TIGHT),
        "4,000 bootstraps": (np.tile([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083], (4000, 1)), weights, "BFGS", {}),
    }  # fmt: skip
    total = np.zeros(2)
    for name, (starts, drawn, method, options) in tasks.items():
        begun = time.perf_counter()
        minimise(lambda t, rows, w=drawn: huber_objective(t, features, target, None if w is None else w[rows], 1e-3), starts)  # type: ignore[misc]  # fmt: skip
        ours = time.perf_counter() - begun
        begun = time.perf_counter()
        for index in range(0, len(starts), EVERY):
            w = ones if drawn is None else drawn[index : index + 1]

            def objective(theta: np.ndarray, w: np.ndarray = w) -> tuple[float, np.ndarray]:
                value, gradient = huber_objective(theta[None], features, target, w, 1e-3)
                return float(value[0]), gradient[0]

            minimize(objective, starts[index], jac=True, method=method, options=options)
        theirs = (time.perf_counter() - begun) * EVERY
        total += (ours, theirs)
        print(
            f"{name:18s} ours {ours:7.1f} s   SciPy {theirs:7.1f} s (scaled)   {theirs / ours:5.1f}x"
        )
    print(f"{'together':18s} ours {total[0]:7.1f} s   SciPy {total[1]:7.1f} s            {total[1] / total[0]:5.1f}x")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
