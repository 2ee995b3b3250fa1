"""The loss over training for each model and smoothing, and a table of the ends."""

from pathlib import Path

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure to `folder` and results.csv beside it; return the figure."""
    figure, data = plots.curves_in_panels(runs, by="task.smoothing", panels="model")
    made = plots.save(folder, "loss_by_step", figure, data, runs.count())
    ends = over_seeds(runs.finished, ["model", "task.smoothing"], "val_loss", facts=["weight_norm"])
    ends.to_csv(folder.parent / "results.csv", index=False)
    return [made]
