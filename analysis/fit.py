"""Fits of scaling laws to tables of runs, from many starts and with bootstraps.

Source of the procedure: arXiv 2404.10102 (Huber loss on log L, summed; the mean would make an
optimiser stop early).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.errors import require
from analysis.expressions import true_rows
from analysis.law import Array, Data, Law, huber_objective
from analysis.minimise import minimise

_SAME = 1e-6  # relative: starts that end so close to the best objective are in its basin


@dataclass(frozen=True)
class Fit:
    """A law with its fitted parameters, their bootstraps and the points that they rest on.

    Args:
        theta: the best parameters [P]; draws: those of the bootstraps [B, P].
        values: the objective that each start ended at [S].
        used, held_out: the points; left_out: numbers of rows not used, by the reason.
    """

    law: Law
    theta: Array
    draws: Array
    values: Array
    delta: float
    used: pd.DataFrame
    held_out: pd.DataFrame
    left_out: dict[str, int]

    @property
    def objective(self) -> float:
        """Sum of Huber losses at the best parameters."""
        return float(self.values.min())

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the used points about the law, in log loss where the law is."""
        points = self.residuals()
        inside = points.loc[~points["held_out"], "residual"]
        return float(np.sqrt((inside**2).sum() / max(1, len(inside) - len(self.theta))))

    @property
    def in_best_basin(self) -> float:
        """Share of the starts that reached the best objective."""
        return float(np.mean(self.values <= self.objective * (1 + _SAME) + 1e-15))

    @property
    def second_basin(self) -> float | None:
        """Objective of the second-best local minimum over all starts, None if there is one only."""
        others = self.values[self.values > self.objective * (1 + 1e-3) + 1e-12]
        return float(others.min()) if len(others) else None

    @cached_property
    def parameters(self) -> pd.DataFrame:
        """A row for each parameter: estimate, SE, 95% interval of the bootstraps."""
        draws = self.law.named(self.draws)
        rows = []
        for name, value in self.law.named(self.theta).items():
            low, high = np.quantile(draws[name], [0.025, 0.975])
            rows.append(
                (name, float(value), float(draws[name].std(ddof=1)), float(low), float(high))
            )
        return pd.DataFrame(rows, columns=["parameter", "estimate", "se", "low", "high"])

    def correlation(self) -> pd.DataFrame:
        """Return the correlation of the bootstrapped parameters, logarithms of positive ones."""
        return pd.DataFrame(self.draws, columns=list(self.law.parameters)).corr()

    def counts(self) -> str:
        """Return a sentence: how many points were fitted, held out and left out, and why."""
        parts = [f"{len(self.used)} points fitted", f"{len(self.held_out)} held out"]
        parts += [f"{count} left out: {why}" for why, count in self.left_out.items()]
        return ", ".join(parts)

    def predict(self, data: Data, confidence: float = 0.95) -> pd.DataFrame:
        """Return columns loss, low, high at `data`; the band leaves out the noise of runs."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.law.predict(self.draws, data), [tail, 1 - tail], axis=0)
        return pd.DataFrame({"loss": self.law.predict(self.theta, data), "low": low, "high": high})

    def residuals(self) -> pd.DataFrame:
        """Return all points with columns predicted, residual (of log L for losses), held_out."""
        both = pd.concat([self.used.assign(held_out=False), self.held_out.assign(held_out=True)])
        data = {name: both[name].to_numpy() for name in self.law.columns}
        predicted = self.law.predict(self.theta, data)
        residual = self.law.response(both["loss"].to_numpy()) - self.law.response(predicted)
        return both.assign(predicted=predicted, residual=residual)

    def compute_optimal(self, flops: float) -> pd.DataFrame:
        """Return the compute-optimal n, d and d/n at `flops` = 6 n d, a row each.

        Columns: quantity, estimate, low, high (95%).

        Raises:
            ValueError: the law is not of Chinchilla's form.
        """
        if {"alpha", "beta"} - set(self.law.parameters):
            raise ValueError(
                f"law {self.law.name} has no compute-optimal size: it needs alpha and beta"
            )
        best, draws = (
            compute_optimal(self.law.named(theta), flops) for theta in (self.theta, self.draws)
        )
        rows = []
        for name, value in best.items():
            low, high = np.quantile(draws[name], [0.025, 0.975])
            rows.append((name, float(value), float(low), float(high)))
        return pd.DataFrame(rows, columns=["quantity", "estimate", "low", "high"])

    def _repr_html_(self) -> str:
        """Return HTML for a notebook: the parameters, above them the number of points."""
        return f"<p>{self.law.name}: {self.counts()}</p>{self.parameters.to_html(index=False)}"

    def report(self) -> dict[str, Any]:
        """Return every number with its interval, as JSON types."""
        points = self.residuals()
        held_out = points[points["held_out"]]
        error = (held_out["loss"] / held_out["predicted"] - 1).to_numpy()
        return {
            "law": self.law.name,
            "source": self.law.source,
            "at_bound": self.law.at_bound(self.theta),
            "parameters": self.parameters.set_index("parameter").to_dict(orient="index"),
            "correlation": self.correlation().to_dict(),
            "covariance": pd.DataFrame(self.draws, columns=list(self.law.parameters))
            .cov()
            .to_dict(),
            "objective": {
                "value": self.objective,
                "kind": f"sum of Huber({self.delta:g}) of "
                + ("log loss" if self.law.log else "the response"),
            },
            "starts": {
                "count": len(self.values),
                "in_best_basin": self.in_best_basin,
                "second_basin": self.second_basin,
            },
            "bootstraps": len(self.draws),
            "points": {
                "used": len(self.used),
                "held_out": len(self.held_out),
                "left_out": self.left_out,
            },
            "rms_residual": float(np.sqrt(np.mean(points["residual"][~points["held_out"]] ** 2))),
            "held_out_error": {
                "mean_relative": float(error.mean()),
                "worst_relative": float(np.abs(error).max()),
            }
            if len(held_out)
            else None,
        }


def fit(
    table: pd.DataFrame,
    law: Law,
    *,
    columns: dict[str, str],
    loss: str,
    holdout: str | None = None,
    delta: float = 1e-3,
    bootstraps: int = 4000,
    seed: int = 0,
    starts: Array | None = None,
) -> Fit:
    """Return `law` fitted to the rows of a table.

    Args:
        columns: the table's name of each column of the law, {"n": "num_parameters"}.
        holdout: an expression of the table's columns; rows for which it is true are not fitted.
        delta: where Huber's loss turns linear, in log loss; seed: of the bootstraps.

    Raises:
        KeyError: a column is missing; the table's are named.
        ValueError: a loss is not positive, or there are too few points for the law.
    """
    points, left_out = _points(table, law, columns, loss)
    out = np.zeros(len(points), dtype=bool)
    if holdout:
        out = points.index.isin(table.index[true_rows(table, holdout, "--holdout")])
    used, held = points[~out].reset_index(drop=True), points[out].reset_index(drop=True)
    if len(used) <= len(law.parameters):
        raise ValueError(
            f"{len(used)} points are too few for the {len(law.parameters)} parameters of "
            f"{law.name} (left out: {left_out or 'none'}, held out: {len(held)})"
        )
    at = law.bind({name: used[name].to_numpy() for name in law.columns})
    target = law.response(used["loss"].to_numpy())

    def objective(theta: Array, _: NDArray[np.intp]) -> tuple[Array, Array]:
        return huber_objective(at, theta, target, None, delta)

    ends, values, _ = minimise(objective, law.start_grid() if starts is None else starts)
    best = ends[np.nanargmin(values)]
    generator, count = np.random.default_rng(seed), len(used)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=bootstraps).astype(float)

    def resampled(theta: Array, rows: NDArray[np.intp]) -> tuple[Array, Array]:
        return huber_objective(at, theta, target, weights[rows], delta)

    draws, _, _ = minimise(resampled, np.tile(best, (bootstraps, 1)))
    return Fit(law, best, draws, values, delta, used, held, left_out)


def _points(
    table: pd.DataFrame, law: Law, columns: dict[str, str], loss: str
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the usable rows under the law's own names, and numbers of others by the reason."""
    names = {name: columns.get(name, name) for name in law.columns} | {"loss": loss}
    require(table, list(names.values()))
    points = pd.DataFrame(
        {name: pd.to_numeric(table[c], errors="coerce") for name, c in names.items()}
    )
    bad = points["loss"] <= 0
    if bad.any():
        raise ValueError(
            f"column {loss} has {int(bad.sum())} losses that are not positive, "
            f"{points['loss'].min()} for example: is it a logarithm?"
        )
    empty = points.isna().any(axis=1)
    other = ~empty & (points <= 0).any(axis=1)
    twice = ~empty & ~other & points.duplicated()
    counts = {
        "a value is missing": empty,
        "a size is not positive": other,
        "the same point again": twice,
    }
    left_out = {why: int(rows.sum()) for why, rows in counts.items() if rows.any()}
    return points[~(empty | other | twice)], left_out


def compute_optimal(named: dict[str, Array], flops: float) -> dict[str, Array]:
    """Return n, d and d/n that minimise a Chinchilla law of these parameters at `flops` = 6 n d."""
    a, b, alpha, beta = (named[name] for name in ("A", "B", "alpha", "beta"))
    ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n = ratio * (flops / 6) ** (beta / (alpha + beta))
    d = (flops / 6) / n
    return {"n": n, "d": d, "tokens_per_parameter": d / n}
