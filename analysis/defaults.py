"""Sensible figures for any sweep, nothing to write."""

from pathlib import Path

import pandas as pd

from analysis.plots import against_size, learning_curves, save
from analysis.run_plots import heat_map, pareto
from analysis.runs import Runs


def default_figures(runs: Runs, folder: Path) -> list[Path]:
    """Draw curves against four axes, and loss against parameters where the sweep varies them."""
    by = "label" if len(runs.table) <= 8 else _varying(runs)
    made = []
    logged = set(runs.history["key"].unique()) | {"step"}
    for x in [x for x in ("step", "tokens", "flops", "wall_s") if x in logged]:
        figure, data = learning_curves(runs, x=x, by=by)
        made.append(save(folder, f"val_loss_by_{x}", figure, data, runs.count()))
    done = runs.finished
    if done["num_parameters"].nunique() > 1:
        figure, data = against_size(runs, by="precision.compute")
        made.append(save(folder, "val_loss_by_parameters", figure, data, runs.count()))
    if done["flops"].nunique() > 1:
        series = "precision.compute" if _varies(done, "precision.compute") else "num_parameters"
        figure, data = pareto(done, cost="flops", by=series, title="Loss against compute")
        made.append(save(folder, "pareto", figure, data, runs.count()))
    for other in ("model.width", "train.batch_size"):
        if _varies(done, "optim.lr") and _varies(done, other):
            title = f"Best learning rate by {other.rpartition('.')[2]}"
            figure, data = heat_map(done, x="optim.lr", y=other, title=title)
            made.append(
                save(folder, f"lr_by_{other.rpartition('.')[2]}", figure, data, runs.count())
            )
    return made


def _varies(table: pd.DataFrame, column: str) -> bool:
    return column in table and 1 < table[column].nunique() <= 12


def _varying(runs: Runs) -> str:
    for column in ("num_parameters", "optim.lr", "precision.compute", "seed"):
        if column in runs.table and 1 < runs.table[column].nunique() <= 8:
            return column
    return "label"
