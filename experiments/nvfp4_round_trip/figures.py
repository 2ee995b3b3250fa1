"""Round-trip error (SQNR) of each format on drawn numbers (drawn.py) and trained operands."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.runs import Runs

HERE = Path(__file__).parent
NAME = "nvfp4_round_trip"
RECIPES = {
    "mxfp4": "mxfp4",
    "nvfp4_all_layers": "nvfp4",
    "fp8_current": "fp8, one scale",
    "mxfp8": "mxfp8",
}
OPERANDS = {"fprop.x": "activations", "fprop.w": "weights", "dgrad.g": "gradients"}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    drawn = pd.read_csv(HERE / "drawn.csv")
    history = runs.history[runs.history["key"].str.endswith("/sqnr_db")]
    last = history.sort_values("step").groupby(["fingerprint", "key"])["value"].last().reset_index()
    parts = last["key"].str.split("/", expand=True)
    last["operand"] = parts[2]
    last["recipe"] = last["fingerprint"].map(runs.finished.set_index("fingerprint")["precision"])
    means = last.groupby(["recipe", "operand"])["value"].mean()
    rows = [
        ("trained", name, label, float(means[recipe, operand]))
        for recipe, name in RECIPES.items()
        for operand, label in OPERANDS.items()
    ]
    trained = pd.DataFrame(rows, columns=drawn.columns)
    table = pd.concat([drawn, trained], ignore_index=True)
    table.to_csv(folder.parent / "results.csv", index=False)
    wide = table.pivot(index=["source", "format"], columns="distribution", values="sqnr_db")
    print(wide.round(1).to_string(na_rep=""))
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.2))
    for axis, (source, part) in zip(axes, table.groupby("source", sort=False), strict=True):
        groups = part.groupby("distribution", sort=False)
        for marker, (name, rows_of) in zip("osD^vP", groups, strict=False):
            axis.plot(rows_of["sqnr_db"], rows_of["format"], marker, label=name, alpha=0.8)
        axis.set(xlabel="SQNR in dB (higher is better)", title=f"{source} numbers")
        axis.legend(fontsize=6)
    return [plots.save(folder, NAME, figure, table, runs.count())]
