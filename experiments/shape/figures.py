"""Loss against depth and against FLOPs at equal parameters, for few and many heads."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAME = "shape"
BY = ["model.depth", "model.width", "model.num_heads"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    done["kflop_per_token"] = done["flops"] / done["tokens"] / 1e3
    table = over_seeds(done, BY, "val_loss", facts=["num_parameters", "kflop_per_token"])
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.9), layout="constrained")
    for axis, x in zip(axes, ("model.depth", "kflop_per_token"), strict=True):
        for index, (heads, part) in enumerate(table.groupby("model.num_heads")):
            axis.errorbar(
                part[x],
                part["mean"],
                part["std"],
                marker="os^"[index],
                capsize=2,
                color=f"C{index}",
                label=f"{heads} heads (n={int(part['n'].min())})",
            )
    shapes = table.drop_duplicates("model.depth")
    axes[0].set(xscale="log", xlabel="layers (width)", ylabel=plots.AXES["val_loss"])
    depths, widths = shapes["model.depth"], shapes["model.width"]
    labels = [f"{depth}\n({width})" for depth, width in zip(depths, widths, strict=True)]
    axes[0].set_xticks(depths, labels=labels)
    axes[0].minorticks_off()
    axes[0].legend()
    axes[1].set(xlabel="training kFLOP per token", ylabel=plots.AXES["val_loss"])
    return [plots.save(folder, NAME, figure, table, runs.count())]
