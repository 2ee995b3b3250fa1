"""Recall by depth and by heads, at as many parameters."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

BY = ["model.depth", "model.width", "model.num_heads"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    columns = [*BY, "seed", "num_parameters", "recall", "recall/known_held_out"]
    table = done[[*columns, "value_accuracy/known_train"]].sort_values([*BY, "seed"])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, BY, "recall", facts=["num_parameters"])
    print(shown.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.8), sharey=True, layout="constrained")
    by_depth = shown[shown["model.num_heads"] == 2]
    by_heads = shown[shown["model.depth"] == 2]
    for axis, part, x, label in (
        (axes[0], by_depth, "model.depth", "layers of two heads"),
        (axes[1], by_heads, "model.num_heads", "heads of two layers"),
    ):
        axis.errorbar(part[x], part["mean"], part["std"].fillna(0.0), fmt="o-", capsize=2)
        axis.set(xscale="log", xlabel=label)
        axis.set_xticks(part[x], labels=[f"{value:g}" for value in part[x]])
        axis.minorticks_off()
    axes[0].set(ylabel="recall of facts", ylim=(-0.02, 1.02))
    return [plots.save(folder, "shape", figure, shown, runs.count())]
