"""Experts beside the dense model at equal active parameters: loss, wall time, load."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.paired import beside_baseline
from analysis.runs import Runs

NAME = "moe"
LAYERS = range(4)
FACTS = ("num_parameters", "num_active_parameters", "wall_s", "load_entropy", "max_violation")


def choice(row: "pd.Series[str]") -> str:
    """Return a cell's name."""
    if row["model.pattern"] != "ae":  # the default pattern is no key
        return "dense"
    return f"experts, balance={row['model.parts.e.balance']}"


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    done["model"] = [choice(row) for _, row in done.iterrows()]
    for name in ("load_entropy", "max_violation"):
        keys = [f"layers.{layer}.moe.{name}" for layer in LAYERS]
        done[name] = done[keys].mean(axis=1)
    table = beside_baseline(
        done, key="model", baseline="dense", metric="val_loss", pair=["seed"], facts=FACTS
    )
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    named = replace(runs, table=done)
    for axis, x in zip(axes, ("step", "wall_s"), strict=False):
        plots.learning_curves(named, x=x, by="model", axis=axis)
    axes[1].get_legend().remove()
    for index, name in enumerate(table["model"][1:], 1):
        part = done[done["model"] == name]
        entropy = [part[f"layers.{layer}.moe.load_entropy"].mean() for layer in LAYERS]
        axes[2].plot(LAYERS, entropy, marker="o", color=f"C{index}", label=name)
    axes[2].axhline(1.0, color="0.6", linewidth=0.8)
    axes[2].set(xlabel="layer", ylabel="entropy of the experts' load (1: even)", xticks=LAYERS)
    return [plots.save(folder, NAME, figure, table, runs.count())]
