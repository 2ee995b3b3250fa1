"""Bootstraps of the Chinchilla law with few and with many points, against a SciPy loop.

    python -m tests.bench.bootstraps

SciPy minimises our objective with BFGS at its default tolerances from the best parameters, for
every twentieth of the bootstraps, scaled up. The whole fit has 4,500 starts besides.
"""

import time

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from analysis.fit import fit
from analysis.law import Array, huber_objective
from analysis.laws import CHINCHILLA
from tests.analysis.known import THETA

BOOTSTRAPS, EVERY = 100, 20


def main() -> None:
    """Print CPU seconds and their ratio for each number of points."""
    print(
        "| points | whole fit | bootstraps, ours | SciPy | ratio |\n| --- | --- | --- | --- | --- |"
    )
    for count in (240, 2_400, 10_000):
        rng = np.random.default_rng(0)
        n, d = np.exp(rng.uniform(np.log(1e7), np.log([[1e10], [1e12]]), (2, count)))
        loss = CHINCHILLA.predict(THETA, {"n": n, "d": d}) * np.exp(rng.normal(0, 2e-3, count))
        table = pd.DataFrame({"n": n, "d": d, "loss": loss})
        begun: dict[str, float] = {}
        started = time.process_time()
        found = fit(
            table,
            CHINCHILLA,
            columns={},
            loss="loss",
            bootstraps=BOOTSTRAPS,
            progress=lambda stage, done, total, b=begun: b.setdefault(stage, time.process_time()),  # type: ignore[misc]
        )
        ended = time.process_time()
        ours = ended - begun["bootstraps"]
        theirs = _scipy({"n": n, "d": d}, np.log(loss), found.theta, rng)
        print(
            f"| {count:,} | {ended - started:.1f} s | {ours:.2f} s | {theirs:.2f} s | "
            f"{ours / theirs:.2f} |"
        )


def _scipy(data: dict[str, Array], target: Array, best: Array, rng: np.random.Generator) -> float:
    at, count = CHINCHILLA.bind(data), len(target)
    started = time.process_time()
    for _ in range(BOOTSTRAPS // EVERY):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=1).astype(float)

        def objective(theta: Array, w: Array = weights) -> tuple[float, Array]:
            values, gradients = huber_objective(at, theta[None], target, w, 1e-3)
            return float(values[0]), gradients[0]

        minimize(objective, best, jac=True, method="BFGS")
    return (time.process_time() - started) * EVERY


if __name__ == "__main__":
    main()
