"""Bits a parameter without junk, among junk, and among junk behind a tag."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs


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
    axis.bar(shown["texts"], shown["mean"], yerr=shown["std"].fillna(0.0), capsize=3, width=0.6)
    axis.set(ylabel="bits a parameter")
    return [plots.save(folder, "junk", figure, shown, runs.count())]
