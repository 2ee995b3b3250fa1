"""Sensible figures for any sweep, nothing to write."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import against_size, curves_in_panels, learning_curves, save, tick
from analysis.pooling import varied
from analysis.run_plots import against_cost, heat_map
from analysis.runs import Runs

_MOST_SERIES = 8
_MOST_PAIRED = 3  # axes of which each pair has a map
_COSTS = {  # file and title by what a run costs
    "flops": ("pareto", "Loss against compute"),
    "wall_s": ("pareto_time", "Loss against time"),
    "peak_memory_bytes": ("pareto_memory", "Loss against memory"),
}
Drawn = tuple[str, Figure, pd.DataFrame]  # name, figure, what it shows
_MEASURES = ("val_loss", "val_bound", "val_infill_loss")


def default_figures(runs: Runs, folder: Path) -> list[Path]:
    """Draw a figure for each question: loss over training, by size, compute, time, memory, axes.

    A series is what the runs differ in besides the seed, so that a mean is over seeds. Where series
    would be too many, and in a map of two axes of several, the best of the other settings is shown
    and said, not a mean over them. A bound on
    the likelihood (`val_bound`, of masked diffusion) has figures of its own: beside a loss that is
    exact it would look worse than it is.
    """
    keys = set(runs.history["key"].unique())
    measures = [key for key in _MEASURES if key in keys] or ["val_loss"]
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
    return [
        save(folder, name, figure, data, runs.count())
        for name, figure, data in (
            *_curves(runs, metric),
            *_at_the_end(runs, metric),
            *_maps(runs.finished, metric),
        )
    ]


def _curves(runs: Runs, metric: str) -> Iterator[Drawn]:
    """Yield a figure for each axis: how fast is the loss reached?"""
    axes = varied(runs.table)
    curves, by = _series(runs, axes)
    panels = None
    if curves.table[by].nunique() > _MOST_SERIES:
        if len(axes) == 2 and max(runs.table[axis].nunique() for axis in axes) <= _MOST_SERIES:
            panels = axes[0]
            curves, by = runs, axes[1]
        elif runs.finished.empty:
            curves, by = runs, _coarse(runs)
        else:
            curves, by = _best_of_each(runs, _coarse(runs), axes, metric)
    logged = set(runs.history["key"].unique()) | {"step"}
    for x in [x for x in ("step", "tokens", "flops", "wall_s") if x in logged]:
        if panels is None:
            figure, data = learning_curves(curves, key=metric, x=x, by=by)
        else:
            figure, data = curves_in_panels(curves, key=metric, x=x, by=by, panels=panels)
        yield f"{metric}_by_{x}", figure, data


def _at_the_end(runs: Runs, metric: str) -> Iterator[Drawn]:
    """Yield the final loss against size, compute, time and memory, where they differ."""
    sized, by = _series(runs, _varied_at_a_size(runs.finished))
    done = sized.finished
    if done["num_parameters"].nunique() > 1:
        yield f"{metric}_by_parameters", *against_size(sized, metric=metric, by=by)
    for cost, (name, title) in _COSTS.items():
        if cost in done and done[cost].nunique() > 1:
            figure, data = against_cost(done, cost=cost, metric=metric, by=by, title=title)
            yield _named(name, metric), figure, data


def _maps(done: pd.DataFrame, metric: str) -> Iterator[Drawn]:
    """Yield a heat map of each pair of axes, of two or three, and of the rates by width or batch.

    Of further axes each place has the best.
    """
    axes = [axis for axis in varied(done) if _varies(done, axis)]
    pairs = list(combinations(axes, 2)) if len(axes) <= _MOST_PAIRED else [(axes[0], axes[1])]
    for pair in pairs:
        x, y = pair if pair[0] == "optim.lr" else reversed(pair)
        title = f"{metric.replace('_', ' ')} by {_short(y)} and {_short(x)}"
        figure, data = _map(done, x, y, metric, title)
        yield _named(f"map_{_short(y)}_{_short(x)}", metric), figure, data
    for other in ("model.width", "train.batch_size"):
        known = any("optim.lr" in pair for pair in pairs)
        if not known and _varies(done, "optim.lr") and _varies(done, other):
            title = f"Best learning rate by {_short(other)}"
            figure, data = _map(done, "optim.lr", other, metric, title)
            yield _named(f"lr_by_{_short(other)}", metric), figure, data


def _map(done: pd.DataFrame, x: str, y: str, metric: str, title: str) -> tuple[Figure, Any]:
    """Return a heat map; over what else varies each place has the best, which the title says."""
    others = [axis for axis in varied(done) if axis not in (x, y)]
    if others and len(done.groupby([x, y], dropna=False)) < len(done.groupby([x, y, *others])):
        done = _best_recipes(done, [x, y], others, metric)
        title += f", the best {', '.join(map(_short, others))}"
    return heat_map(done, x=x, y=y, metric=metric, title=title)


def _best_of_each(runs: Runs, by: str, axes: list[str], metric: str) -> tuple[Runs, str]:
    """Return the runs of the best recipe for each value of `by`, and a column that names both."""
    others = [axis for axis in axes if axis != by]
    best = _best_recipes(runs.finished, [by], others, metric)
    name = f"{_short(by)} (its best {', '.join(map(_short, others))})"
    recipes = best[others].map(tick).agg(", ".join, axis=1)
    named = best.assign(**{name: best[by].map(tick) + " (" + recipes + ")"})
    named.attrs |= runs.table.attrs
    return replace(runs, table=named), name


def _best_recipes(
    done: pd.DataFrame, by: list[str], others: list[str], metric: str
) -> pd.DataFrame:
    """Return for each value of `by` the runs of those `others` whose mean over seeds is least."""
    keys = [*by, *others]
    means = done.groupby(keys, dropna=False)[metric].transform("mean")
    least = means.groupby([done[key] for key in by], dropna=False).transform("min")
    # Of recipes with equal means the first: two would be pooled.
    kept = done[means == least]
    first = kept.drop_duplicates(by)[keys]
    chosen = kept.merge(first, on=keys)
    chosen.attrs |= done.attrs
    return chosen


def _short(column: str) -> str:
    return column.rpartition(".")[2]


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
