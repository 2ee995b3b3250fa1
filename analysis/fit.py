"""Fits of scaling laws to tables of runs, from many starts and with bootstraps.

Source of the procedure: arXiv 2404.10102 (Huber loss on log L, summed; the mean would make an
optimiser stop early). Of the band of a law: Hesterberg, The American Statistician 69 (2015).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.expressions import true_rows
from analysis.law import Array, Data, Law
from analysis.objective import Objective
from analysis.points import usable_points
from analysis.resampling import Progress, bootstrap, search

_SAME = 1e-6  # relative: starts that end so close to the best objective are in its basin


@dataclass(frozen=True)
class Fit:
    """A law with its fitted parameters, their bootstraps and the points that they rest on.

    Args:
        theta: the best parameters [P]; draws: those of the bootstraps [B, P].
        objective: sum of Huber losses at the best parameters.
        values: the objective that each start ended at [S]; with many points, on some of them.
        used, held_out: the points; left_out: numbers of rows not used, by the reason.
    """

    law: Law
    theta: Array
    draws: Array
    objective: float
    values: Array
    delta: float
    used: pd.DataFrame
    held_out: pd.DataFrame
    left_out: dict[str, int]

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the used points about the law, in log loss where the law is."""
        points = self.residuals()
        inside = points.loc[~points["held_out"], "residual"]
        return float(np.sqrt((inside**2).sum() / max(1, len(inside) - len(self.theta))))

    @property
    def in_best_basin(self) -> float:
        """Share of the starts that reached the best objective."""
        return float(np.mean(self.values <= self.values.min() * (1 + _SAME) + 1e-15))

    @property
    def second_basin(self) -> float | None:
        """Objective of the second-best local minimum over all starts, None if there is one only."""
        others = self.values[self.values > self.values.min() * (1 + 1e-3) + 1e-12]
        others = others[np.isfinite(others)]
        return float(others.min()) if len(others) else None

    @cached_property
    def parameters(self) -> pd.DataFrame:
        """A row for each parameter: estimate, SE, 95% interval; NaN without bootstraps."""
        named, draws = self.law.named(self.theta), self.law.named(self.draws)
        rows = [(k, float(v), _deviation(draws[k]), *_ends(draws[k])) for k, v in named.items()]
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
        """Return columns loss, low, high at `data`; the band leaves out the noise of runs.

        It is the expanded percentile interval: resampled points vary less than new ones would.
        """
        free = max(1, len(self.used) - len(self.theta))
        tail = stats.norm.cdf(stats.t.ppf((1 - confidence) / 2, free))
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
        if {"A", "B", "alpha", "beta"} - self.law.named(self.theta).keys():
            raise ValueError(
                f"law {self.law.name} has no compute-optimal size: it needs alpha and beta"
            )
        best, draws = (
            compute_optimal(self.law.named(theta), flops) for theta in (self.theta, self.draws)
        )
        rows = [(name, float(value), *_ends(draws[name])) for name, value in best.items()]
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
            "correlation": self.correlation().to_dict() if len(self.draws) > 1 else None,
            "covariance": pd.DataFrame(self.draws, columns=list(self.law.parameters))
            .cov()
            .to_dict()
            if len(self.draws) > 1
            else None,
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
    cluster: str | None = None,
    delta: float = 1e-3,
    bootstraps: int = 4000,
    seed: int = 0,
    starts: Array | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Fit:
    """Return `law` fitted to the rows of a table.

    Args:
        columns: the table's name of each column of the law, {"n": "num_parameters"}.
        holdout: an expression of the table's columns; rows for which it is true are not fitted.
        cluster: a column; the bootstrap draws all rows of one of its values together, for example
            all points of a run. None: rows are drawn.
        delta: where Huber's loss turns linear, in log loss; seed: of the bootstraps.
        progress: told what is done, how many of how many.

    Raises:
        KeyError: a column is missing; the table's are named.
        ValueError: a value or an argument is not possible, or there are too few points for the law.
    """
    if not (np.isfinite(delta) and delta > 0):
        raise ValueError(f"delta={delta:g} must be a positive number; 1e-3 is the published one")
    if bootstraps < 0:
        raise ValueError(f"bootstraps={bootstraps} must be 0 or more")
    points, left_out = usable_points(table, law, columns, loss, cluster)
    out = np.zeros(len(points), dtype=bool)
    if holdout:
        out = points.index.isin(table.index[true_rows(table, holdout, "--holdout")])
    used, held = points[~out].reset_index(drop=True), points[out].reset_index(drop=True)
    if len(used) <= len(law.parameters):
        raise ValueError(
            f"{len(used)} points are too few for the {len(law.parameters)} parameters of "
            f"{law.name} (left out: {left_out or 'none'}, held out: {len(held)})"
        )
    objective = Objective(law, used, delta)
    grid = law.start_grid() if starts is None else starts
    ends, values, reached, allowed = search(objective, grid, progress)
    if not np.isfinite(values[0]):
        raise ValueError(f"{law.name} is finite at these points from none of {len(grid)} starts")
    codes = used["cluster"].to_numpy()
    draws = bootstrap(objective, allowed, codes, bootstraps, seed, progress)
    return Fit(law, ends[0], draws, float(values[0]), reached, delta, used, held, left_out)


def _ends(draws: Array) -> tuple[float, float]:
    """Return the 95% interval of `draws`, NaN where there are none."""
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (np.nan, np.nan)
    return float(low), float(high)


def _deviation(draws: Array) -> float:
    return float(draws.std(ddof=1)) if len(draws) > 1 else np.nan


def compute_optimal(named: dict[str, Array], flops: float) -> dict[str, Array]:
    """Return n, d and d/n that minimise a Chinchilla law of these parameters at `flops` = 6 n d.

    As an exponent goes to 0 they leave all bounds, and are then given as exp of -300 to 300.
    """
    log_a, log_b = np.log(named["A"]), np.log(named["B"])
    alpha, beta = (np.maximum(named[name], 1e-9) for name in ("alpha", "beta"))
    budget = np.log(flops / 6)
    log_n = (np.log(alpha / beta) + log_a - log_b + beta * budget) / (alpha + beta)
    log_n = np.clip(log_n, -300.0, 300.0)
    n, d = np.exp(log_n), np.exp(np.clip(budget - log_n, -300.0, 300.0))
    return {"n": n, "d": d, "tokens_per_parameter": d / n}
