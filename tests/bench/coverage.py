"""How often intervals of 95% hold the truth, on tables of runs whose law is known.

    python -m tests.bench.coverage [REPETITIONS [PART ...]]    PART: laws, isoflop, envelope

Each repetition draws new noise (0.2% of the loss of a run) for a table of the Chinchilla law with
one or three runs a size, and makes every interval that is shown for such a table. The binomial
error of a share near 95% is 1.5% at 200 repetitions; where budgets or parameters are averaged it is
smaller.
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from analysis.envelope import envelope
from analysis.fit import Fit, fit
from analysis.forecast import forecast
from analysis.isoflop import Method, isoflop
from analysis.laws import CHINCHILLA
from analysis.projection import variable_projection
from analysis.robustness import flat_valleys, profiles
from tests.analysis.known import EXPONENT, THETA, TRUE, best_size, budgets, curves, grid

NOISE = 2e-3
BOOTSTRAPS = 400
LATER = 1e24  # FLOPs, beyond all runs
Inside = Iterator[tuple[str, float]]  # what the interval is of, and the share that holds the truth


def main() -> None:
    """Print a row for each interval: the share that holds the truth."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    parts: dict[str, Callable[[int, int], Inside]] = {
        "laws": _laws,
        "isoflop": _isoflop,
        "envelope": _envelope,
    }
    chosen = sys.argv[2:] or list(parts)
    print("| interval of | 1 run a size | 3 runs a size |\n| --- | --- | --- |")
    for part in chosen:
        shares: dict[int, dict[str, list[float]]] = {1: {}, 3: {}}
        for seeds, found in shares.items():
            for draw in range(repetitions):
                for name, inside in parts[part](seeds, draw):
                    found.setdefault(name, []).append(inside)
        for name in shares[1]:
            one, three = (f"{np.mean(found[name]):.1%}" for found in shares.values())
            print(f"| {name} | {one} | {three} |", flush=True)


def _laws(seeds: int, draw: int) -> Inside:
    """Intervals of a fit to 5 x 5 sizes and tokens."""
    table = grid(NOISE, seeds, draw + 1, side=5)
    found = fit(
        table,
        CHINCHILLA,
        columns={},
        loss="loss",
        bootstraps=BOOTSTRAPS,
        seed=draw,
        starts=np.concatenate([THETA[None], CHINCHILLA.start_grid()[::450]]),
    )
    yield "a law's parameters", _share(found.parameters.set_index("parameter"), TRUE)
    allowed = flat_valleys(profiles(found)).set_index("parameter")
    yield "a law's parameters, by profile", _share(allowed, TRUE)
    n = float(best_size(np.array([LATER]))[0])
    best = {"n": n, "d": LATER / (6 * n), "tokens_per_parameter": LATER / (6 * n * n)}
    sizes = found.compute_optimal(LATER).set_index("quantity")
    yield "compute-optimal sizes of a law at 1e24 FLOPs", _share(sizes, best)
    yield "a forecast at 1e24 FLOPs", _forecast(found, n, LATER / (6 * n), draw)
    yield "a forecast within the sizes", _forecast(found, 3e8, 2e10, draw)
    points = (table[name].to_numpy() for name in ("n", "d", "loss"))
    second = variable_projection(*points, bootstraps=100, seed=draw).set_index("parameter")
    yield "a law's parameters, by variable projection", _share(second, TRUE)


def _forecast(found: Fit, n: float, d: float, draw: int) -> float:
    """Return whether the forecast of a new run holds what it measures."""
    point = pd.DataFrame({"n": [n], "d": [d]})
    expected = CHINCHILLA.predict(THETA, {"n": np.array([n]), "d": np.array([d])})[0]
    measured = expected * np.exp(np.random.default_rng([draw, 7]).normal(0.0, NOISE))
    row = forecast(found, point).iloc[0]
    return float(row["low"] < measured < row["high"])


def _isoflop(seeds: int, draw: int) -> Inside:
    """Intervals of both methods at 5 budgets, sizes even around the best or mostly too large."""
    designs = {"": (7, 5.0, 1.0), ", 9 wide, lopsided sizes": (9, 16.0, 1.5)}
    methods: tuple[Method, ...] = ("parabola", "akima")
    for label, (sizes, span, off) in designs.items():
        table = budgets(NOISE, sizes, seeds, count=5, span=span, off=off, draw=draw + 1)
        for method in methods:
            found = isoflop(
                table,
                flops="flops",
                n="n",
                loss="loss",
                method=method,
                bootstraps=BOOTSTRAPS,
                seed=draw,
            )
            kept = found.budgets[found.budgets["rejected"] == ""]
            true = best_size(kept["flops"].to_numpy())
            inside = (kept["n_low"] < true) & (true < kept["n_high"])
            yield f"isoFLOP best size, {method}{label}", float(inside.mean())
            rows = found.exponents.set_index("quantity")
            exponents = {"n": EXPONENT, "tokens": 1 - EXPONENT}
            yield f"isoFLOP exponents, {method}{label}", _share(rows, exponents)
            later = found.at(LATER).set_index("quantity")
            best = {"n": float(best_size(np.array([LATER]))[0])}
            yield f"isoFLOP best size at 1e24 FLOPs, {method}{label}", _share(later, best)


def _envelope(seeds: int, draw: int) -> Inside:
    """The exponent of the lower envelope of 12 sizes, each run with an error of its own."""
    table = pd.concat([curves(12, 120).assign(seed=seed) for seed in range(seeds)])
    table["run"] = table.groupby(["run", "seed"]).ngroup()
    error = np.random.default_rng([draw, 3]).normal(0.0, NOISE, table["run"].nunique())
    table["loss"] *= np.exp(error[table["run"]])
    found = envelope(
        table, run="run", n="n", flops="flops", loss="loss", bootstraps=BOOTSTRAPS, seed=draw
    )
    exponents = {"n": EXPONENT, "tokens": 1 - EXPONENT}
    yield "envelope exponents", _share(found.exponents.set_index("quantity"), exponents)


def _share(intervals: pd.DataFrame, truth: dict[str, float]) -> float:
    """Return the share of the rows whose low and high enclose the truth."""
    rows = intervals.loc[list(truth)]
    true = np.array(list(truth.values()))
    return float(((rows["low"] < true) & (true < rows["high"])).mean())


if __name__ == "__main__":
    main()
