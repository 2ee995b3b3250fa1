"""Loss against learning rate for each width under the standard parametrisation and muP."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAMES = {"gpt2": "standard parametrisation", "mup": "muP (base width 64)"}
BY = ["model.init", "model.width", "optim.lr"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure, results.csv and best.csv; return the figures."""
    table = over_seeds(runs.finished, BY, "val_loss")
    best = table.loc[table.groupby(["model.init", "model.width"])["mean"].idxmin()]
    table.to_csv(folder.parent / "results.csv", index=False)
    best.to_csv(folder.parent / "best.csv", index=False)
    print(best.to_string(index=False))
    return [plots.save(folder, "loss_by_lr", _draw(table, best), table, runs.count())]


def _draw(table: pd.DataFrame, best: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), sharey=True)
    for axis, (init, part) in zip(axes, table.groupby("model.init"), strict=True):
        for index, (width, curve) in enumerate(part.groupby("model.width")):
            axis.errorbar(
                curve["optim.lr"],
                curve["mean"],
                curve["std"],
                marker="o",
                color=f"C{index}",
                label=f"width {width} (n={int(curve['n'].max())})",
            )
            low = best[(best["model.init"] == init) & (best["model.width"] == width)]
            axis.plot(low["optim.lr"], low["mean"], "*", markersize=15, color=f"C{index}")
        axis.set(xscale="log", xlabel="learning rate at base width", title=NAMES[str(init)])
    axes[0].set_ylabel(plots.AXES["val_loss"])
    axes[0].set_ylim(top=table["mean"].min() + 1.2)
    axes[0].legend()
    return figure
