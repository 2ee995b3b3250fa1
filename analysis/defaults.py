"""Sensible figures for any sweep, nothing to write."""

from pathlib import Path

from analysis.plots import against_size, learning_curves, save
from analysis.runs import Runs


def default_figures(runs: Runs, folder: Path) -> list[Path]:
    """Draw curves against four axes, and loss against parameters where the sweep varies them."""
    by = "label" if len(runs.table) <= 8 else _varying(runs)
    made = []
    for x in ("step", "tokens", "flops", "wall_s"):
        figure, data = learning_curves(runs, x=x, by=by)
        made.append(save(folder, f"val_loss_by_{x}", figure, data, runs.count()))
    if runs.finished["num_parameters"].nunique() > 1:
        series = "precision.compute"
        figure, data = against_size(runs, by=series)
        made.append(save(folder, "val_loss_by_parameters", figure, data, runs.count()))
    return made


def _varying(runs: Runs) -> str:
    for column in ("num_parameters", "optim.lr", "precision.compute", "seed"):
        if column in runs.table and 1 < runs.table[column].nunique() <= 8:
            return column
    return "label"
