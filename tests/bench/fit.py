"""Fitting the Chinchilla law to Epoch's points, all starts and bootstraps, against a SciPy loop.

    python -m tests.bench.fit EPOCH.csv    svg_extracted_data.csv of
                                           epoch-research/analyzing-chinchilla

SciPy runs a random fiftieth of the starts and of the bootstraps, scaled up: L-BFGS-B with
tolerances at which as many starts arrive as ours (its defaults stop early at a sum this small), and
BFGS from the published start with its defaults, as in the published procedure. It runs once with
logsumexp and huber of SciPy and the analytic gradient, and once with our objective.
"""

import sys
import time

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from analysis.law import huber_objective
from analysis.laws import CHINCHILLA
from analysis.minimise import minimise

EVERY = 50
TIGHT = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 15000, "maxfun": 30000}


def main(file: str) -> None:
    """Print seconds and ratios."""
    table = pd.read_csv(file)
    n, loss = table["Model Size"].to_numpy(), table["loss"].to_numpy()
    d = table["Training FLOP"].to_numpy() / (6 * n)
    fitted = loss < np.sort(loss)[-5]  # as published: without the five largest losses
    at, target = CHINCHILLA.bind({"n": n[fitted], "d": d[fitted]}), np.log(loss[fitted])
    count, draws = len(target), np.random.RandomState(42)
    weights = np.stack(
        [np.bincount(draws.choice(count, count), minlength=count) for _ in range(4000)]
    ).astype(float)
    ones = np.ones((1, count))
    tasks = {
        "4,500 starts": (CHINCHILLA.start_grid(), None, "L-BFGS-B", TIGHT),
        "4,000 bootstraps": (
            np.tile([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083], (4000, 1)),
            weights,
            "BFGS",
            {},
        ),
    }
    print(
        "| | ours | plain SciPy | | SciPy, our objective | |\n| --- | --- | --- | --- | --- | --- |"
    )
    logs = np.log(n[fitted]), np.log(d[fitted])
    total = np.zeros(3)
    for name, (starts, drawn, method, options) in tasks.items():
        begun = time.perf_counter()
        minimise(
            lambda t, rows, w=drawn: huber_objective(
                at, t, target, None if w is None else w[rows], 1e-3
            ),
            starts,
        )  # type: ignore[misc]
        seconds = [time.perf_counter() - begun]
        chosen = draws.choice(len(starts), len(starts) // EVERY, replace=False)
        for plain in (True, False):
            begun = time.perf_counter()
            for index in chosen:
                w = ones if drawn is None else drawn[index : index + 1]

                def objective(theta: np.ndarray, w: np.ndarray = w) -> tuple[float, np.ndarray]:
                    value, gradient = huber_objective(at, theta[None], target, w, 1e-3)
                    return float(value[0]), gradient[0]

                work = (lambda t, w=w: _plain(t, *logs, target, w[0])) if plain else objective  # type: ignore[misc]
                minimize(work, starts[index], jac=True, method=method, options=options)
            seconds.append((time.perf_counter() - begun) * EVERY)
        total += seconds
        _print(name, *seconds)
    _print("together", *total)


def _plain(
    theta: np.ndarray, n: np.ndarray, d: np.ndarray, target: np.ndarray, w: np.ndarray
) -> tuple[float, np.ndarray]:
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    fitted = logsumexp(terms, axis=0)
    slope = w * np.clip(fitted - target, -1e-3, 1e-3)
    first, second, third = slope * np.exp(terms - fitted)
    gradient = np.array(
        [first.sum(), second.sum(), third.sum(), -(first * n).sum(), -(second * d).sum()]
    )
    return float((w * huber(1e-3, fitted - target)).sum()), gradient


def _print(name: str, ours: float, plain: float, same: float) -> None:
    print(
        f"| {name} | {ours:.1f} s | {plain:.0f} s | {plain / ours:.1f}x "
        f"| {same:.0f} s | {same / ours:.1f}x |"
    )


if __name__ == "__main__":
    main(sys.argv[1])
