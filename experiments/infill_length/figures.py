"""Exact match of a middle of two digits by the length of the canvas at the beginning."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.runs import Runs

TRUE_LENGTH = 2


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done, rows = runs.finished, []
    kinds = (done["task.merge"] > 0).map({True: "expand and delete", False: "fixed"})
    for name in [c for c in done.columns if str(c).startswith("infilling/exact_match@")]:
        canvas = str(name).partition("@")[2]
        if canvas.endswith("_stderr"):
            continue
        errors = done[f"infilling/length_error@{canvas}"]
        for kind, part in done.groupby(kinds):
            rows.append(
                {
                    "kind": kind,
                    "canvas": int(canvas),
                    "exact_match": part[name].mean(),
                    "std": part[name].std(),
                    "length_error": errors[part.index].mean(),
                    "n": int(part[name].notna().sum()),
                }
            )
    table = pd.DataFrame(rows).sort_values(["kind", "canvas"])
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.2), layout="constrained")
    for kind, curve in table.groupby("kind"):
        std = curve["std"].fillna(0.0)
        axes[0].errorbar(curve["canvas"], curve["exact_match"], std, marker="o", label=kind)
        axes[1].plot(curve["canvas"], curve["length_error"], marker="o", label=kind)
    axes[0].set(ylabel="exact match", ylim=(-0.03, 1.03))
    axes[1].set(ylabel="distance from the true length (tokens)")
    for axis in axes:
        axis.axvline(TRUE_LENGTH, color="black", linestyle=":")
        axis.set(xscale="log", xlabel="masks to begin with")
        axis.set_xticks(sorted(set(table["canvas"])), sorted(set(table["canvas"])))
        axis.minorticks_off()
    axes[0].legend()
    return [plots.save(folder, "exact_match_by_canvas", figure, table, runs.count())]
