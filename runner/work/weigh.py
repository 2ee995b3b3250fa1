"""Weights of data sources, by regression on small runs with other weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.data.corpus import source_weight
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records import metrics
from runner.records.cells import Cell, load_cell
from runner.records.contracts import Inputs, Outcome
from runner.records.journal import Journal
from runner.work.config import WeighWork
from runner.work.notes import note_environment
from runner.work.outputs import write_output

Array = NDArray[np.float64]


def weigh(
    cfg: WeighWork,
    cell: Cell,
    inputs: Inputs,
    journal: Journal | None,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> Outcome:
    """Write outputs/weights.json, a weight for each source, and regression.json, the fit.

    Raises:
        ConfigError: there is no input named proxies, or too few of them have a finite value of the
            metric.
    """
    if journal is None:
        return "finished"
    note_environment(journal, cell, ranks)
    if "proxies" not in inputs:
        raise ConfigError(
            "work=weigh needs an input named proxies, the runs on other weights; "
            "a stage gives it by from: {proxies: {stage: ..., all: true}}"
        )
    mixtures, values, used = _measurements(cfg.metric, inputs["proxies"])
    target = np.log(values) if cfg.log else values
    fit = regress(mixtures, target)
    rng = np.random.default_rng(cell.config.seed)
    candidates = rng.dirichlet(
        cfg.concentration * mixtures.shape[1] * mixtures.mean(axis=0) + 1e-6, cfg.candidates
    )
    predicted = candidates @ fit["coefficients"]
    best = candidates[np.argsort(predicted, kind="stable")[: cfg.keep]].mean(axis=0)
    expected = float(best @ fit["coefficients"])
    record = {
        "metric": cfg.metric,
        "log": cfg.log,
        "proxies": used,
        "left_out": len(inputs["proxies"]) - len(used),
        "coefficients": fit["coefficients"].tolist(),
        "residual_sd": fit["residual_sd"],
        "r_squared": fit["r_squared"],
        "predicted": float(np.exp(expected)) if cfg.log else expected,
        "weights": best.tolist(),
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    write_output(cell.folder, "regression.json", text + "\n", journal)
    write_output(cell.folder, "weights.json", json.dumps(best.tolist()) + "\n", journal)
    logged = {name: record[name] for name in ("predicted", "r_squared")}
    journal.metrics(len(used), {name: v for name, v in logged.items() if v is not None})
    return "finished"


def regress(mixtures: Array, target: Array) -> dict[str, Any]:
    """Return `coefficients`, `residual_sd` and `r_squared` of target = mixtures @ coefficients.

    The fit is by least squares. It needs no intercept, since the weights of a row sum to 1.
    `residual_sd` is None if there are no more runs than sources, `r_squared` if all targets are
    equal.

    Args:
        mixtures: weights, [runs, sources]; rows sum to 1.
        target: [runs].
    """
    coefficients, _, _, _ = np.linalg.lstsq(mixtures, target, rcond=None)
    residuals = target - mixtures @ coefficients
    free = len(target) - mixtures.shape[1]
    total = float(((target - target.mean()) ** 2).sum())
    unexplained = float((residuals**2).sum())
    return {
        "coefficients": coefficients,
        "residual_sd": float(np.sqrt(unexplained / free)) if free > 0 else None,
        "r_squared": 1.0 - unexplained / total if total > 0 else None,
    }


def _measurements(metric: str, runs: tuple[Path, ...]) -> tuple[Array, Array, list[dict[str, Any]]]:
    """Return (weights [runs, sources], values [runs], a record of each run).

    Runs without a finite value of the metric are left out.
    """
    rows = []
    for run in runs:
        sources = load_cell(run).config.data.sources
        weights = np.array([source_weight(source) for source in sources], dtype=np.float64)
        value = metrics.latest(run).get(metric)
        if value is not None and np.isfinite(value):
            rows.append((run.name, weights / weights.sum(), float(value)))
    sizes = {len(weights) for _, weights, _ in rows}
    if len(sizes) != 1 or len(rows) < max(sizes):
        raise ConfigError(
            f"{len(rows)} of {len(runs)} proxies have a finite {metric}, on {sorted(sizes)} "
            "sources; the regression needs at least as many runs as sources, all on the same ones"
        )
    mixtures, values = np.stack([w for _, w, _ in rows]), np.array([v for _, _, v in rows])
    used = [{"run": name, "weights": w.tolist(), metric: v} for name, w, v in rows]
    return mixtures, values, used
