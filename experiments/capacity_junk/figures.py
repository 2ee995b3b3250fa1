"""Bits a parameter without junk, among junk, and among junk behind a tag."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

TIMES_LESS = {"no junk": 1, "7/8 junk": 20, "7/8 junk, tagged": 2}  # arXiv 2404.05405


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    tagged = done["data.domain_tag"].astype(bool)
    done["texts"] = "no junk"
    done.loc[done["data.junk"] > 0, "texts"] = "7/8 junk"
    done.loc[(done["data.junk"] > 0) & tagged, "texts"] = "7/8 junk, tagged"
    columns = ["texts", "seed", "names_nats", "values_nats", "bits", "bits_per_parameter"]
    table = done[columns].sort_values(["texts", "seed"])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, ["texts"], "bits_per_parameter")
    without = shown.loc[shown["texts"] == "no junk", "mean"]
    shown["times_less"] = (without.iloc[0] if len(without) else float("nan")) / shown["mean"]
    print(shown.to_string(index=False))
    figure, axis = plt.subplots(layout="constrained")
    bars = shown.set_index("texts").reindex(list(TIMES_LESS))
    axis.bar(bars.index, bars["mean"], yerr=bars["std"].fillna(0.0), capsize=3, width=0.6)
    expected = [bars["mean"].iloc[0] / times for times in TIMES_LESS.values()]
    left, right = ([place + side for place in range(len(expected))] for side in (-0.2, 0.2))
    axis.hlines(expected, left, right, color="black", label="no junk / published factor")
    axis.set(ylabel="bits a parameter")
    axis.set_ylim(bottom=0)
    axis.legend()
    return [plots.save(folder, "junk", figure, shown, runs.count())]
