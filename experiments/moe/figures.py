"""Experts beside the dense model at equal active parameters: loss by step and by wall time, and how even the load is."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import plots
from analysis.compare import over_seeds, paired_difference
from analysis.runs import Runs, from_folders

HERE = Path(__file__).parent
NAME = "moe"
LAYERS = range(4)


def choice(row: "pd.Series[str]") -> str:
    """Name a cell."""
    if row["model.pattern"] != "ae":  # the default pattern is no key
        return "dense"
    return f"experts, balance={row['model.parts.e.balance']}"


def main(runs: Runs, folder: Path = HERE / "figures") -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    done["choice"] = [choice(row) for _, row in done.iterrows()]
    for name in ("load_entropy", "max_violation"):
        keys = [f"layers.{layer}.moe.{name}" for layer in LAYERS]
        done[name] = done[keys].mean(axis=1)
    gap = paired_difference(done, key="choice", baseline="dense", metric="val_loss", pair=["seed"])
    facts = done.groupby("choice")[["num_parameters", "num_active_parameters", "wall_s", "load_entropy", "max_violation"]].mean()  # fmt: skip
    table = over_seeds(done, ["choice"], "val_loss").merge(facts, on="choice")
    table = table.merge(gap.rename(columns={"value": "choice", "n": "pairs"}), on="choice", how="left")  # fmt: skip
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    names = sorted(done["choice"].unique())
    for axis, x in zip(axes, ("step", "wall_s"), strict=False):
        for index, name in enumerate(names):
            _curve(axis, runs, done[done["choice"] == name], x, f"C{index}", name)
        axis.set(xlabel=plots.AXES[x], ylabel=plots.AXES["val_loss"])
    axes[0].legend()
    for index, name in enumerate(names[1:], 1):
        part = done[done["choice"] == name]
        entropy = [part[f"layers.{layer}.moe.load_entropy"].mean() for layer in LAYERS]
        axes[2].plot(LAYERS, entropy, marker="o", color=f"C{index}", label=name)
    axes[2].axhline(1.0, color="0.6", linewidth=0.8)
    axes[2].set(xlabel="layer", ylabel="entropy of the experts' load (1: even)", xticks=LAYERS)
    return [plots.save(folder, NAME, figure, table, runs.count())]


def _curve(axis: plt.Axes, runs: Runs, part: pd.DataFrame, x: str, color: str, name: str) -> None:
    """Draw the mean over seeds, and the range."""
    curves = runs.curves("val_loss", "step")
    curves = curves[curves["fingerprint"].isin(part["fingerprint"])]
    seen = curves.pivot(index="x", columns="fingerprint", values="value").dropna()
    places = np.asarray(seen.index, dtype=float)
    if (
        x == "wall_s"
    ):  # evaluations come between the lines that tell the time: time is steps times the mean step
        places = places * part["wall_s"].mean() / part["train.steps"].iloc[0]
    axis.plot(
        places, seen.mean(axis=1), marker="o", color=color, label=f"{name} (n={seen.shape[1]})"
    )
    axis.fill_between(places, seen.min(axis=1), seen.max(axis=1), color=color, alpha=0.2)


if __name__ == "__main__":
    for path in main(from_folders(Path(sys.argv[1] if len(sys.argv) > 1 else "."), NAME)):
        print(path)
