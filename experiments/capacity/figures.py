"""Bits that were learnt against parameters, and contours of recall over facts and parameters."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots
from analysis.contours import bit_guides, contours, whole_grid
from analysis.paired import over_seeds
from analysis.runs import Runs

BY = ["exposures", "people", "num_parameters"]
RATIOS = ["bits_per_parameter", "bits_per_parameter_without_embeddings", "most_bits_per_parameter"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figures and results.csv; return the figures."""
    done = runs.finished.copy()
    sizes = done[[name for name in done if name.startswith("data.attributes.")]]
    done["people"] = done["data.num_people"]
    done["facts"] = done["people"] * sizes.notna().sum(axis=1)
    done["bits_per_fact"] = np.log2(sizes).mean(axis=1)
    done["exposures"] = done["train.steps"] * done["train.batch_size"] // done["people"]
    done["recall"] = done["value_recall"]
    columns = [*BY, "facts", "bits_per_fact", "model.width", "seed", "names_nats", "values_nats"]
    table = done[[*columns, "recall", "bits", *RATIOS]].sort_values([*BY, "seed"])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, BY, "bits", facts=["recall", *RATIOS])
    print(shown.to_string(index=False))
    drawn = [plots.save(folder, "capacity", _bits(shown), shown, runs.count())]
    figure, recalled = _contours(table)
    if figure is not None:
        drawn.append(plots.save(folder, "contours", figure, recalled, runs.count()))
    return drawn


def _bits(shown: pd.DataFrame) -> Figure:
    """Draw bits against parameters, a panel for each number of exposures."""
    panels = list(shown.groupby("exposures"))
    size = (3.0 * len(panels) + 0.4, 2.8)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    sizes = np.array(sorted(shown["num_parameters"].unique()), dtype=float)
    for axis, (exposures, panel) in zip(axes[0], panels, strict=True):
        for index, (people, part) in enumerate(panel.groupby("people")):
            x, spread = part["num_parameters"], part["std"].fillna(0)
            colour, label = f"C{index}", f"{people:g} people"
            axis.plot(x, part["mean"], "o-", color=colour, label=label)
            axis.fill_between(
                x, part["mean"] - spread, part["mean"] + spread, color=colour, alpha=0.2
            )
            most = (part["most_bits_per_parameter"] * x).max()
            axis.axhline(most, color=colour, linestyle="-.", linewidth=0.8)
        for bits, style in ((1, ":"), (2, "--")):
            label = f"{bits} bit{'s'[: bits - 1]} a parameter"
            axis.plot(sizes, bits * sizes, style, color="0.5", label=label)
        axis.plot([], [], "-.", color="0.5", linewidth=0.8, label="all that there is to learn")
        axis.set(xscale="log", xlabel="parameters", title=f"{exposures:,.0f} exposures")
        axis.set_xticks(sizes, labels=[f"{size:,.0f}" for size in sizes])
        axis.minorticks_off()
    axes[0][0].set(ylabel="bits learnt")
    axes[0][0].set_yscale("symlog", linthresh=100)  # a model that knows nothing has 0 bits
    axes[0][0].set_ylim(bottom=0)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _contours(table: pd.DataFrame) -> tuple[Figure | None, pd.DataFrame]:
    """Draw lines of equal recall, a panel for each number of exposures that has a whole grid."""
    grids = {
        exposures: whole_grid(part, x="facts", y="num_parameters")
        for exposures, part in table.groupby("exposures")
    }
    grids = {
        exposures: part
        for exposures, part in grids.items()
        if min(part["facts"].nunique(), part["num_parameters"].nunique()) > 1
    }
    if not grids:
        return None, table.iloc[:0]
    figure, axes = plt.subplots(
        1, len(grids), figsize=(3.4 * len(grids), 2.8), squeeze=False, layout="constrained"
    )
    shown = {}
    for axis, (exposures, part) in zip(axes[0], grids.items(), strict=True):
        _, shown[exposures] = contours(
            part,
            x="facts",
            y="num_parameters",
            metric="recall",
            levels=(0.1, 0.5, 0.95),
            guides=bit_guides(part["bits_per_fact"].mean()),
            limits=(0.0, 1.0),
            axis=axis,
        )
        axis.set_title(f"{exposures:,.0f} exposures")
        axis.get_legend().remove()
    lines = dict(
        pair[::-1]
        for axis in axes[0]
        for pair in zip(*axis.get_legend_handles_labels(), strict=True)
    )
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines))
    return figure, pd.concat(shown, names=["exposures"]).reset_index("exposures")
