"""Validation loss against steps, and the mean of the seeds beside nanoGPT's."""

from pathlib import Path

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NANOGPT = 1.8857  # nanoGPT with the same layers, heads, width, block, batch and steps, on a CPU


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    figure, data = plots.learning_curves(runs, by="num_parameters")
    figure.axes[0].axhline(NANOGPT, color="0.4", linestyle="--", label="nanoGPT, final")
    figure.axes[0].legend()
    figure.axes[0].set_title("Tiny Shakespeare: below nanoGPT's loss")
    made = [plots.save(folder, "val_loss", figure, data, runs.count())]
    result = over_seeds(runs.finished, ["num_parameters"], "val_loss")
    result["nanogpt"] = NANOGPT
    result.to_csv(folder.parent / "results.csv", index=False)
    print(result.to_string(index=False))
    return made
