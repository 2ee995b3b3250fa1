"""Sensible figures for any sweep, nothing to write."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from analysis.plots import against_size, learning_curves, save
from analysis.pooling import varied
from analysis.run_plots import heat_map, pareto
from analysis.runs import Runs

_MOST_SERIES = 8


def default_figures(runs: Runs, folder: Path) -> list[Path]:
    """Draw curves against four axes, and loss against parameters where the sweep varies them.

    A series is what the runs differ in besides the seed, so that a mean is over seeds. A bound on
    the likelihood (`val_bound`, of masked diffusion) has figures of its own: beside a loss that is
    exact it would look worse than it is.
    """
    keys = set(runs.history["key"].unique())
    measures = [key for key in ("val_loss", "val_bound") if key in keys] or ["val_loss"]
    if len(measures) == 1:
        return _figures(runs, folder, measures[0])
    return [
        file for metric in measures for file in _figures(_measured_by(runs, metric), folder, metric)
    ]


def _measured_by(runs: Runs, metric: str) -> Runs:
    """Return the runs that have logged `metric`."""
    logged = runs.history.loc[runs.history["key"] == metric, "fingerprint"]
    table = runs.table[runs.table["fingerprint"].isin(logged)]
    table.attrs |= runs.table.attrs
    return replace(runs, table=table)


def _figures(runs: Runs, folder: Path, metric: str) -> list[Path]:
    curves, by = _series(runs, varied(runs.table))
    if curves.table[by].nunique() > _MOST_SERIES:
        curves, by = runs, _coarse(runs)
    made = []
    logged = set(runs.history["key"].unique()) | {"step"}
    for x in [x for x in ("step", "tokens", "flops", "wall_s") if x in logged]:
        figure, data = learning_curves(curves, key=metric, x=x, by=by)
        made.append(save(folder, f"{metric}_by_{x}", figure, data, runs.count()))
    done = runs.finished
    sized, by = _series(runs, _varied_at_a_size(done))
    if done["num_parameters"].nunique() > 1:
        figure, data = against_size(sized, metric=metric, by=by)
        made.append(save(folder, f"{metric}_by_parameters", figure, data, runs.count()))
    if done["flops"].nunique() > 1:
        figure, data = pareto(
            sized.finished, cost="flops", metric=metric, by=by, title="Loss against compute"
        )
        made.append(save(folder, _named("pareto", metric), figure, data, runs.count()))
    for other in ("model.width", "train.batch_size"):
        if _varies(done, "optim.lr") and _varies(done, other):
            title = f"Best learning rate by {other.rpartition('.')[2]}"
            figure, data = heat_map(done, x="optim.lr", y=other, metric=metric, title=title)
            name = _named(f"lr_by_{other.rpartition('.')[2]}", metric)
            made.append(save(folder, name, figure, data, runs.count()))
    return made


def _named(figure: str, metric: str) -> str:
    return figure if metric == "val_loss" else f"{figure}_{metric}"


def _varies(table: pd.DataFrame, column: str) -> bool:
    return column in table and 1 < table[column].nunique() <= 12


def _series(runs: Runs, columns: list[str]) -> tuple[Runs, str]:
    """Return `runs` with a column that joins the values of `columns`, and its name."""
    if len(columns) == 1:
        return runs, columns[0]
    name = ", ".join(columns) or "runs"
    parts = runs.table[columns].astype(str)
    joined = parts.agg(", ".join, axis=1) if columns else pd.Series("all", index=parts.index)
    table = runs.table.assign(**{name: joined})
    table.attrs |= runs.table.attrs
    return replace(runs, table=table), name


def _varied_at_a_size(table: pd.DataFrame) -> list[str]:
    """Return what runs of the same number of parameters differ in besides the seed."""
    found = [varied(part) for _, part in table.groupby("num_parameters")]
    return list(dict.fromkeys(column for columns in found for column in columns))


def _coarse(runs: Runs) -> str:
    """Return a column of few values to draw curves by, where series would be too many."""
    columns = (*varied(runs.table), "num_parameters", "seed")
    few = [c for c in columns if 1 < runs.table[c].nunique() <= _MOST_SERIES]
    return few[0] if few else "label"
