"""Gain, gradient norm and loss against depth: one stream, hyper-connections, mHC."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAME = "residual_streams"
NAMES = {"none": "one residual", "hc": "hyper-connections", "mhc": "mHC"}
PANELS = {
    "streams.amax_forward": "Amax gain, forward",
    "streams.amax_backward": "Amax gain, backward",
    "grad_norm": "gradient norm",
    "val_loss": plots.AXES["val_loss"],
}


def kind(row: "pd.Series[Any]") -> str:
    """Return the kind of a run's residual streams."""
    streams = row.get("model.streams.kind")
    return "none" if pd.isna(streams) else str(streams)


def largest(runs: Runs, key: str) -> pd.Series:
    """Return the largest value of a metric over each run's steps."""
    return runs.history[runs.history["key"] == key].groupby("fingerprint")["value"].max()


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    done["residual"] = [kind(row) for _, row in done.iterrows()]
    for key in list(PANELS)[:3]:
        done[f"most.{key}"] = done["fingerprint"].map(largest(runs, key))
    by = ["residual", "model.depth"]
    columns = [f"most.{key}" for key in list(PANELS)[:3]] + [
        "grad_norm",
        "tokens_per_s",
        "num_parameters",
    ]
    table = over_seeds(done, by, "val_loss", facts=columns)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 4, figsize=(10.5, 2.8), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        metric = key if key == "val_loss" else f"most.{key}"
        for index, name in enumerate(NAMES):
            part = done[done["residual"] == name].dropna(subset=[metric])
            mean = part.groupby("model.depth")[metric].mean()
            axis.scatter(part["model.depth"], part[metric], s=8, color=f"C{index}", alpha=0.5)
            axis.plot(mean, marker="os^"[index], color=f"C{index}", label=NAMES[name])
        axis.set(
            xscale="log", xlabel="layers", ylabel=label if key == "val_loss" else f"largest {label}"
        )
        if key.startswith("streams"):
            axis.set_yscale("log")
        axis.set_xticks([12, 24, 48], labels=["12", "24", "48"])
        axis.minorticks_off()
    axes[3].legend()
    return [plots.save(folder, NAME, figure, table, runs.count())]
