"""Accuracy predicted through the loss: a law of the loss, then a law of the accuracy at that loss.

Both are fitted to the same runs. A bootstrap draws runs and fits both to them, so that the interval
holds the uncertainty of both laws and of the noise of a run about their chain.

Source: Bhagia et al. arXiv 2412.04403 (OLMo's ladder); Gadre et al. arXiv 2403.08540.
"""

from dataclasses import dataclass
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
        free = len(self.second.used) - len(self.first.theta) - len(self.second.theta)
        wide = stats.t.ppf(0.975, max(1, free))
        low, high = (
            best[0] + sign * wide * np.hypot(sign * (end - best[0]) / 1.96, self.noise)
            for sign, end in ((-1, np.minimum(below, best[0])), (1, np.maximum(above, best[0])))
        )
        return points.assign(loss=loss[0], accuracy=best[0], low=low, high=high)

    @property
    def noise(self) -> float:
        """Standard deviation of the accuracy of a fitted run about the chain."""
        used = self.first.used
        data = {name: used[name].to_numpy() for name in self.first.law.columns}
        _, fitted = self._through(self.first.theta[None], self.second.theta[None], data)
        residual = self.second.used["loss"].to_numpy() - fitted[0]
        free = len(residual) - len(self.first.theta) - len(self.second.theta)
        return float(np.sqrt((residual**2).sum() / max(1, free)))

    def report(self) -> dict[str, Any]:
        """Return every number of both fits, as JSON types."""
        return {"first": self.first.report(), "second": self.second.report(), "noise": self.noise}

    def _through(self, first: Array, second: Array, data: dict[str, Array]) -> tuple[Array, Array]:
        """Return losses and accuracies [S, M] for parameters of both laws [S, P]."""
        losses = self.first.law.predict(first, data)
        accuracies = [
            self.second.law.predict(theta, {"x": loss})
            for theta, loss in zip(second, losses, strict=True)
        ]
        return losses, np.stack(accuracies)


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
