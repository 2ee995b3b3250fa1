"""Accuracy predicted through the loss: a law of the loss, then a law of the accuracy at that loss.

Both are fitted to the same runs. A bootstrap draws runs and fits both to them, so that the interval
holds the uncertainty of both laws and of the noise of a run about their chain. An accuracy a has
the variance of a quasi-binomial variable, a (1 - a) times a dispersion that the runs tell: near 0
and 1 it varies less.

Source: McCullagh and Nelder, Generalized Linear Models (1989), section 4.5, for the dispersion;
Bhagia et al. arXiv 2412.04403 (OLMo's ladder); Gadre et al. arXiv 2403.08540.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import require
from analysis.fit import Fit, fit
from analysis.law import Array, Law
from analysis.laws import CHINCHILLA, EXPONENTIAL_ERROR, OVERTRAINING, SIGMOID
from analysis.resampling import Progress

CHAINS: dict[str, tuple[Law, Law]] = {
    "olmo_ladder": (CHINCHILLA, SIGMOID),  # a task's loss, its accuracy
    "gadre": (OVERTRAINING, EXPONENTIAL_ERROR),  # validation loss, top-1 error over tasks
}


@dataclass(frozen=True)
class Chain:
    """Two fits to the same runs: loss by sizes, accuracy (or error) by loss."""

    first: Fit
    second: Fit

    def predict(self, points: pd.DataFrame) -> pd.DataFrame:
        """Return `points` with columns loss, accuracy, low, high: 95% for a new run's accuracy.

        Raises:
            KeyError: a column of the first law is missing.
        """
        require(points, list(self.first.law.columns))
        data = {name: points[name].to_numpy(dtype=float) for name in self.first.law.columns}
        loss, best = self._through(self.first.theta[None], self.second.theta[None], data)
        _, draws = self._through(self.first.draws, self.second.draws, data)
        below, above = np.quantile(draws, [0.025, 0.975], axis=0)
        wide, noise = stats.t.ppf(0.975, self._free), self.noise(best[0])
        low, high = (
            best[0] + sign * wide * np.hypot(sign * (end - best[0]) / 1.96, noise)
            for sign, end in ((-1, np.minimum(below, best[0])), (1, np.maximum(above, best[0])))
        )
        return points.assign(loss=loss[0], accuracy=best[0], low=low, high=high)

    def noise(self, accuracy: Array) -> Array:
        """Return the standard deviation of the accuracy of a run about the chain, at `accuracy`."""
        return np.sqrt(self.dispersion * _variance(accuracy))

    @cached_property
    def dispersion(self) -> float:
        """Squared deviation of a fitted run's accuracy a from the chain, over a (1 - a)."""
        used = self.first.used
        data = {name: used[name].to_numpy() for name in self.first.law.columns}
        _, fitted = self._through(self.first.theta[None], self.second.theta[None], data)
        residual = self.second.used["loss"].to_numpy() - fitted[0]
        return float((residual**2 / _variance(fitted[0])).sum() / self._free)

    @property
    def _free(self) -> int:
        parameters = len(self.first.theta) + len(self.second.theta)
        return max(1, len(self.second.used) - parameters)

    def report(self) -> dict[str, Any]:
        """Return every number of both fits, as JSON types."""
        both = {"first": self.first.report(), "second": self.second.report()}
        return both | {"dispersion": self.dispersion}

    def _through(self, first: Array, second: Array, data: dict[str, Array]) -> tuple[Array, Array]:
        """Return losses and accuracies [S, M] for parameters of both laws [S, P]."""
        losses = self.first.law.predict(first, data)
        accuracies = [
            self.second.law.predict(theta, {"x": loss})
            for theta, loss in zip(second, losses, strict=True)
        ]
        return losses, np.stack(accuracies)


def _variance(accuracy: Array) -> Array:
    """Return a (1 - a), of what a law puts outside 0 to 1 that of the nearest percent."""
    inside = np.clip(accuracy, 0.01, 0.99)
    return np.asarray(inside * (1 - inside))


def chain(
    table: pd.DataFrame,
    laws: tuple[Law, Law],
    *,
    columns: dict[str, str],
    loss: str,
    accuracy: str,
    cluster: str | None = None,
    deltas: tuple[float, float] = (1e-3, 1e-2),
    bootstraps: int = 1000,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Chain:
    """Return both laws fitted to the runs that have a loss and an accuracy.

    Args:
        columns: the table's name of each column of the first law; accuracy: what the second law is
            of, an accuracy or an error.
        cluster: as in `fit`; deltas: Huber's of the first law (log loss) and of the second.

    Raises:
        KeyError, ValueError: as in `fit`.
    """
    first, second = laws
    names = [columns.get(name, name) for name in first.columns]
    require(table, [*names, loss, accuracy])
    known = table[table[[*names, loss, accuracy]].notna().all(axis=1)].drop_duplicates(
        [*names, loss, accuracy]
    )
    shared: dict[str, Any] = {"cluster": cluster, "bootstraps": bootstraps, "seed": seed}
    shared["progress"] = progress
    of_loss = fit(known, first, columns=columns, loss=loss, delta=deltas[0], **shared)
    of_accuracy = fit(known, second, columns={"x": loss}, loss=accuracy, delta=deltas[1], **shared)
    if len(of_loss.used) != len(of_accuracy.used):
        raise ValueError(
            f"{len(of_loss.used)} runs can be used for the loss, {len(of_accuracy.used)} for "
            "the accuracy: give sizes and losses above 0, each run once"
        )
    return Chain(of_loss, of_accuracy)
