"""Bits that were learnt against parameters, with guides at 1 and 2 bits a parameter."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

BY = ["exposures", "people", "num_parameters"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    done["people"] = done["data.num_people"]
    done["exposures"] = done["train.steps"] * done["train.batch_size"] // done["people"]
    columns = [*BY, "model.width", "seed", "names_nats", "values_nats", "bits"]
    ratios = ["bits_per_parameter", "bits_per_parameter_without_embeddings"]
    table = done[[*columns, *ratios, "most_bits_per_parameter"]].sort_values([*BY, "seed"])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, BY, "bits", facts=ratios)
    print(shown.to_string(index=False))
    figure, axis = plt.subplots(layout="constrained")
    for index, (exposures, part) in enumerate(shown.groupby("exposures")):
        low, high = (part["mean"] - part["std"].fillna(0), part["mean"] + part["std"].fillna(0))
        colour = f"C{index}"
        label = f"{exposures:g} exposures"
        axis.plot(part["num_parameters"], part["mean"], "o-", color=colour, label=label)
        axis.fill_between(part["num_parameters"], low, high, color=colour, alpha=0.2)
    sizes = np.array(sorted(shown["num_parameters"].unique()), dtype=float)
    for bits, style, label in ((1, ":", "1 bit a parameter"), (2, "--", "2 bits a parameter")):
        axis.plot(sizes, bits * sizes, style, color="0.5", label=label)
    most = (table["most_bits_per_parameter"] * table["num_parameters"]).max()
    axis.axhline(most, color="0.7", label="all that there is to learn")
    axis.set(xscale="log", xlabel="parameters", ylabel="bits learnt")
    axis.set_yscale("symlog", linthresh=100)  # a model that knows nothing has 0 bits
    axis.set_ylim(bottom=0)
    axis.set_xticks(sizes, labels=[f"{size:,.0f}" for size in sizes])
    axis.minorticks_off()
    axis.legend(fontsize=6)
    return [plots.save(folder, "capacity", figure, shown, runs.count())]
