"""What fine-tuning gains on Shakespeare over training from scratch, and what it forgets of code."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    done = runs.finished.copy()
    table = over_seeds(done, ["stage", "optim.lr"], "val_loss")
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    return [plots.save(folder, "gain_and_forgetting", _draw(table), table, runs.count())]


def _draw(table: pd.DataFrame) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.2), sharey=True)
    texts = {
        "Shakespeare": ("scratch", "finetune"),
        "Python's standard library": ("pretrain", "forgotten"),
    }
    names = {"forgotten": "after fine-tuning", "pretrain": "before", "finetune": "fine-tuned"}
    for axis, (text, stages) in zip(axes, texts.items(), strict=True):
        part = table[table["stage"].isin(stages)].sort_values(
            ["stage", "optim.lr"], ascending=[False, True]
        )
        labels = [
            f"{names.get(s, s)}\nlr {lr:g}"
            for s, lr in zip(part["stage"], part["optim.lr"], strict=True)
        ]
        axis.errorbar(labels, part["mean"], part["std"], fmt="o", capsize=3)
        axis.set(title=f"on {text}", xlim=(-0.5, len(part) - 0.5))
    axes[0].set_ylabel(plots.AXES["val_loss"])
    return figure
