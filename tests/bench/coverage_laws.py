"""Designs, and the intervals of laws, forecasts, isoFLOP minima, envelopes and chains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.chain import CHAINS, chain
from analysis.envelope import envelope
from analysis.fit import Fit, fit
from analysis.forecast import forecast
from analysis.identification import unidentified
from analysis.isoflop import Method, isoflop
from analysis.law import Law
from analysis.laws import CHINCHILLA, POWER_WITH_OFFSET
from analysis.minimise import minimise
from analysis.objective import Objective
from analysis.projection import variable_projection
from analysis.robustness import flat_valleys, profiles
from tests.analysis.known import EXPONENT, THETA, TRUE, best_size

BOOTSTRAPS = 200
TABLES = 20  # fitted at once
LATER = 10.0  # times the FLOPs of the largest run
Inside = dict[str, float | None]  # the share that holds the truth; None: no interval is given
Draw = Callable[[Any, Any, int], Inside]
SIGMOID = {"floor": 0.25, "height": 0.7, "k": 3.0, "middle": 2.9}
QUESTIONS = 1000


@dataclass(frozen=True)
class Study:
    """Intervals of one kind: what is varied down the table and across it, and one draw.

    Args:
        slow: designs that are drawn every twentieth time only; tables: that one draw makes.
    """

    draw: Draw
    designs: Mapping[str, Any]
    cases: Mapping[str, Any]
    slow: frozenset[str] = frozenset()
    tables: int = 1


@dataclass(frozen=True)
class Design:
    """Sizes [M] and tokens [M], and the standard deviation of a run's loss, in nats at 3 nats.

    Args:
        relative: it grows with the loss, as the fits take it to; else it is the same everywhere.
    """

    n: np.ndarray
    d: np.ndarray
    noise: float
    relative: bool = True

    def spread(self, loss: np.ndarray) -> np.ndarray:
        """Return the standard deviation of runs of this loss."""
        return self.noise * (loss / 3.0 if self.relative else np.ones_like(loss))

    def table(self, seeds: int, draw: int) -> pd.DataFrame:
        """Return runs: n, d, flops, seed, loss."""
        n, d = (np.tile(v, seeds) for v in (self.n, self.d))
        loss = expected(n, d)
        error = np.random.default_rng([draw, seeds]).normal(0.0, self.spread(loss))
        seed = np.repeat(np.arange(seeds), len(self.n))
        table = pd.DataFrame({"n": n, "d": d, "flops": 6 * n * d, "seed": seed})
        return table.assign(loss=loss + error)

    @property
    def later(self) -> float:
        """FLOPs beyond all runs."""
        return float(LATER * (6 * self.n * self.d).max())


def expected(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return the loss of the known law."""
    return CHINCHILLA.predict(THETA, {"n": np.asarray(n), "d": np.asarray(d)})


def grid(noise: float) -> Design:
    """Return 5 x 5 sizes and tokens."""
    sizes = np.meshgrid(np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 5))
    return Design(*(v.ravel() for v in sizes), noise)


def line(noise: float) -> Design:
    """Return 10 sizes at 20 tokens for each parameter."""
    n = np.geomspace(1e7, 1e10, 10)
    return Design(n, 20 * n, noise)


def budgets(noise: float, count: int, sizes: int, span: float, off: float = 1.0) -> Design:
    """Return sizes from 1 / span to span of the best, times `off`, at budgets of 1e18 to 1e21."""
    flops, factor = np.meshgrid(
        np.geomspace(1e18, 1e21, count), np.geomspace(1 / span, span, sizes) * off, indexing="ij"
    )
    n = (best_size(flops) * factor).ravel()
    return Design(n, flops.ravel() / (6 * n), noise)


def _laws(of: tuple[Design, Law], seeds: int, draw: int) -> Inside:
    """Intervals of the fits of TABLES tables; profiles of every fourth."""
    rows = [
        _of_fit(of[0], found, index % 4 == 0) for index, found in enumerate(_fits(*of, seeds, draw))
    ]
    shares = pd.DataFrame(rows).mean()
    return {str(name): None if np.isnan(share) else share for name, share in shares.items()}


def _of_fit(design: Design, found: Fit, profiled: bool) -> Inside:
    """Return the share of the intervals of a fit that hold the truth."""
    inside: Inside = {}
    inside["a law's parameters"] = _share(found.parameters.set_index("parameter"), TRUE)
    if profiled:
        allowed = flat_valleys(profiles(found))
        inside["a law's parameters, by profile"] = _share(allowed.set_index("parameter"), TRUE)
        told = unidentified(found, allowed)
        inside["(the points are said not to determine the parameters)"] = float(bool(told))
    n = float(best_size(np.array([design.later]))[0])
    d = design.later / (6 * n)
    sizes = found.compute_optimal(design.later).set_index("quantity")
    best = {"n": n, "d": d, "tokens_per_parameter": d / n}
    inside["compute-optimal sizes at 10 x the FLOPs"] = _share(sizes, best)
    later = (design.n[-1] * LATER**0.5, design.d[-1] * LATER**0.5)
    middle = (float(np.median(design.n)), float(np.median(design.d)))
    inside["the loss of a run at 10 x the FLOPs"] = _forecast(found, *later, design)
    inside["the loss of a run within the sizes"] = _forecast(found, *middle, design)
    at = {"n": np.array([later[0]]), "d": np.array([later[1]])}
    band = found.predict(at).iloc[0]
    true = float(expected(at["n"], at["d"])[0])
    inside["the law's loss at 10 x the FLOPs"] = float(band["low"] < true < band["high"])
    points = (found.used[name].to_numpy() for name in ("n", "d", "loss"))
    second = variable_projection(*points).set_index("parameter")
    inside["a law's parameters, by variable projection"] = _share(second, TRUE)
    return inside


def _fits(design: Design, law: Law, seeds: int, draw: int) -> list[Fit]:
    """Return what `fit` returns for TABLES tables: all minimised at once, from the known law."""
    points = [design.table(seeds, draw + index).assign(cluster=0) for index in range(TABLES)]
    of = [Objective(law, table, 1e-3) for table in points]
    at_truth = np.stack([objective.inverse_curvature(THETA) for objective in of])
    theta, least, _ = minimise(
        _together(of, 1, None), np.tile(THETA, (TABLES, 1)), inverse=at_truth
    )
    size = len(points[0])
    rng = np.random.default_rng([draw, seeds, 2])
    weights = rng.multinomial(size, np.full(size, 1 / size), size=TABLES * BOOTSTRAPS).astype(float)
    metrics = np.stack([o.inverse_curvature(best) for o, best in zip(of, theta, strict=True)])
    draws, _, _ = minimise(
        _together(of, BOOTSTRAPS, weights),
        np.repeat(theta, BOOTSTRAPS, axis=0),
        inverse=np.repeat(metrics, BOOTSTRAPS, axis=0),
        floor=float(least.min()),
        tolerance=1e-9,
    )
    return [
        Fit(law, best, drawn, float(value), np.array([value]), 1e-3, table, table.iloc[:0], {})
        for best, drawn, value, table in zip(
            theta, draws.reshape(TABLES, BOOTSTRAPS, -1), least, points, strict=True
        )
    ]


def _together(
    of: list[Objective], each: int, weights: np.ndarray | None
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return one objective of all tables: row r belongs to table r // `each`."""

    def objective(theta: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = np.empty(len(theta)), np.empty(theta.shape)
        for table in np.unique(rows // each):
            own = rows // each == table
            drawn = None if weights is None else weights[rows[own]]
            values[own], slopes[own] = of[table](theta[own], drawn)
        return values, slopes

    return objective


def _line(of: tuple[Design, Law], seeds: int, draw: int) -> Inside:
    """Intervals of a law where tokens follow parameters; its own parameters have no truth there."""
    design, law = of
    table = design.table(seeds, draw).assign(x=lambda runs: runs["flops"])
    found = fit(table, law, columns={}, loss="loss", bootstraps=BOOTSTRAPS, seed=draw)
    inside: Inside = {}
    for name, n in (
        ("the loss of a run at 10 x the FLOPs", design.n[-1] * LATER**0.5),
        ("the loss of a run within the sizes", float(np.median(design.n))),
    ):
        point = pd.DataFrame({"n": [n], "d": [20 * n], "x": [120 * n * n]})
        row = forecast(found, point[list(law.columns)]).iloc[0]
        true = expected(point["n"].to_numpy(), point["d"].to_numpy())
        inside[name] = _holds(row, float(true[0]), float(design.spread(true)[0]))
    told = unidentified(found)
    inside["(the points are said not to determine the parameters)"] = float(bool(told))
    return inside


def _forecast(found: Fit, n: float, d: float, design: Design) -> float:
    """Return how probably the forecast holds what a new run measures."""
    row = forecast(found, pd.DataFrame({"n": [n], "d": [d]})).iloc[0]
    true = expected(np.array([n]), np.array([d]))
    return _holds(row, float(true[0]), float(design.spread(true)[0]))


def _holds(row: "pd.Series[Any]", true: float, noise: float) -> float:
    """Return the probability that low to high holds a normal variable about `true`."""
    ends = stats.norm.cdf([row["low"], row["high"]], true, noise)
    return float(ends[1] - ends[0])


def _isoflop(design: tuple[Design, Method], seeds: int, draw: int) -> Inside:
    """Intervals of isoFLOP minima."""
    runs, method = design
    found = isoflop(
        runs.table(seeds, draw),
        flops="flops",
        n="n",
        loss="loss",
        method=method,
        bootstraps=BOOTSTRAPS,
        seed=draw,
    )
    kept = found.budgets[found.budgets["rejected"] == ""]
    true = best_size(kept["flops"].to_numpy())
    inside: Inside = {}
    inside["best size at a budget"] = float(
        ((kept["n_low"] < true) & (true < kept["n_high"])).mean()
    )
    exponents = {"n": EXPONENT, "tokens": 1 - EXPONENT}
    inside["exponents"] = _share(found.exponents.set_index("quantity"), exponents)
    best = {"n": float(best_size(np.array([runs.later]))[0])}
    inside["best size at 10 x the FLOPs"] = _share(found.at(runs.later).set_index("quantity"), best)
    return inside


def _envelope(design: tuple[int, float, float], seeds: int, draw: int) -> Inside:
    """The exponents of a lower envelope; each run has an error of its own and one of each point.

    Args:
        design: the number of sizes, the error of a run and of a logged loss.
    """
    sizes, of_run, of_point = design
    rng = np.random.default_rng([draw, seeds])
    n, run, d = (
        v.ravel()
        for v in np.meshgrid(
            np.geomspace(1e7, 1e10, sizes), np.arange(seeds), np.geomspace(1e8, 1e12, 120)
        )
    )
    table = pd.DataFrame({"n": n, "flops": 6 * n * d, "run": n * 10 + run})
    errors = rng.normal(0.0, of_run, sizes * seeds)[pd.factorize(table["run"])[0]]
    table["loss"] = expected(n, d) + errors + rng.normal(0.0, of_point, len(table))
    found = envelope(
        table, run="run", n="n", flops="flops", loss="loss", bootstraps=BOOTSTRAPS, seed=draw
    )
    exponents = {"n": EXPONENT, "tokens": 1 - EXPONENT}
    return {"exponents": _share(found.exponents.set_index("quantity"), exponents)}


def _chain(design: Design, seeds: int, draw: int) -> Inside:
    """The accuracy of a run at 10 x the FLOPs, and within the sizes."""
    first, last = CHAINS["olmo_ladder"]
    laws = replace(first, starts={k: (v,) for k, v in TRUE.items()}), last
    second = laws[1].theta({k: np.array(v) for k, v in SIGMOID.items()})

    def accuracy(loss: np.ndarray) -> np.ndarray:
        return laws[1].predict(second, {"x": loss})

    table = design.table(seeds, draw)
    right = accuracy(table["loss"].to_numpy())
    rng = np.random.default_rng([draw, seeds, 1])
    table["accuracy"] = rng.binomial(QUESTIONS, right) / QUESTIONS
    found = chain(
        table, laws, columns={}, loss="loss", accuracy="accuracy", bootstraps=BOOTSTRAPS, seed=draw
    )
    largest = (design.n.max() * LATER**0.5, design.d.max() * LATER**0.5)
    places = {
        "the accuracy of a run at 10 x the FLOPs": largest,
        "the accuracy of a run within the sizes": (np.median(design.n), np.median(design.d)),
    }
    inside: Inside = {}
    for name, (n, d) in places.items():
        row = found.predict(pd.DataFrame({"n": [n], "d": [d]})).iloc[0]
        exact = expected(np.array([n]), np.array([d]))
        right = float(accuracy(exact)[0])
        slope = float((accuracy(exact + 1e-4)[0] - right) / 1e-4)
        spread = float(design.spread(exact)[0])
        noise = np.hypot(slope * spread, np.sqrt(right * (1 - right) / QUESTIONS))
        inside[name] = _holds(row, right, float(noise))
    return inside


def _share(intervals: pd.DataFrame, truth: dict[str, float]) -> float | None:
    """Return the share of the rows given an interval that it holds the truth of."""
    rows = intervals.loc[list(truth)]
    true = pd.Series(truth)
    given = rows["low"].notna()
    inside = (rows["low"] < true) & (true < rows["high"])
    return float(inside[given].mean()) if given.any() else None


_SEEDS = {"1 run a size": 1, "3 runs a size": 3}
_ANY_LOSS = "5 x 5 of n and d, sd 0.01 at any loss"
_LINE = "10 sizes, d = 20 n, sd 0.003"
STUDIES: dict[str, Study] = {
    "isoflop": Study(
        _isoflop,
        {
            "parabola, 7 sizes x 5 budgets, sd 0.005": (budgets(0.005, 5, 7, 5.0), "parabola"),
            "parabola, 5 sizes x 4 budgets, sd 0.01": (budgets(0.01, 4, 5, 4.0), "parabola"),
            "parabola, 9 wide, lopsided sizes x 6 budgets, sd 0.02": (
                budgets(0.02, 6, 9, 16.0, 1.5),
                "parabola",
            ),
            "parabola, 7 sizes x 5 budgets, sd 0.005 at any loss": (
                replace(budgets(0.005, 5, 7, 5.0), relative=False),
                "parabola",
            ),
            "akima, 7 sizes x 5 budgets, sd 0.005": (budgets(0.005, 5, 7, 5.0), "akima"),
        },
        _SEEDS,
    ),
    "laws": Study(
        _laws,
        {
            "5 x 5 of n and d, sd 0.003": (grid(0.003), CHINCHILLA),
            "7 sizes x 5 budgets, sd 0.02": (budgets(0.02, 5, 7, 5.0), CHINCHILLA),
            f"{_ANY_LOSS}, linear residuals": (
                replace(grid(0.01), relative=False),
                CHINCHILLA.linear(),
            ),
            _ANY_LOSS: (replace(grid(0.01), relative=False), CHINCHILLA),
        },
        _SEEDS,
        tables=TABLES,
    ),
    "line": Study(
        _line,
        {
            f"{_LINE}, the power law of FLOPs": (line(0.003), POWER_WITH_OFFSET),
            f"{_LINE}, Chinchilla's law": (line(0.003), CHINCHILLA),
        },
        _SEEDS,
        frozenset([f"{_LINE}, Chinchilla's law"]),
    ),
    "envelope": Study(
        _envelope,
        {
            f"{sizes} sizes, sd of a run {run}, of a point 0.02": (sizes, run, 0.02)
            for sizes, run in ((6, 0.005), (12, 0.01))
        },
        _SEEDS,
    ),
    "chain": Study(
        _chain,
        {"5 x 5 of n and d, sd 0.01": grid(0.01), _LINE: line(0.003)},
        _SEEDS,
        frozenset([_LINE]),
    ),
}
