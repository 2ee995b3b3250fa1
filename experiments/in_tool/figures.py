"""Parameters that facts require, by heart and looked up; unseen people; recall in training."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import plots
from analysis.contours import bit_guides, contours, whole_grid
from analysis.paired import over_seeds
from analysis.required import crossover, over_seeds_required, required_sizes
from analysis.runs import Runs

NAMES = {"in_weight": "by heart", "in_tool": "looked up"}
BITS_PER_FACT = 31.25 / 4  # 7 places, 213 cities, 100 occupations, 17,136 dates
PUBLISHED = {  # facts: parameters, arXiv 2508.20755
    "by heart": {512: 16.6e3, 1024: 27.2e3, 2048: 37.2e3, 4096: 45.7e3, 8192: 69.8e3},
    "looked up": {512: 23.3e3, 1024: 27.9e3, 2048: 32.2e3, 4096: 28.3e3, 8192: 22.2e3},
}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figures and results.csv; return the figures."""
    done = runs.finished.copy()
    done["facts"] = 4 * done["data.num_people"]
    done["kind"] = done["data.condition"].map(NAMES)
    measured = [name for name in done if name.startswith(("recall", "call_", "copy_", "value_"))]
    columns = ["kind", "facts", "model.width", "seed", "num_parameters", *sorted(measured)]
    table = done[[*columns, *({"hallucinated"} & set(done))]].sort_values(columns[:4])
    table.to_csv(folder.parent / "results.csv", index=False)
    required = required_sizes(table, by=["kind", "facts"])
    over = over_seeds_required(required, by=["kind", "facts"])
    print(over.to_string(index=False))
    crossing = crossover(
        _of_both_kinds(required), x="facts", kind="kind", rising="by heart", flat="looked up"
    )
    print("they cross at {:.0f} facts, {:.0f} to {:.0f}".format(*crossing))
    note = runs.count()
    drawn = [
        plots.save(folder, "required", _required(over, crossing), over, note),
        plots.save(folder, "unseen", *_unseen(table), note),
    ]
    by_heart = table[table["kind"] == "by heart"]
    by_heart = whole_grid(by_heart, x="facts", y="num_parameters")
    if by_heart["facts"].nunique() > 1 and by_heart["num_parameters"].nunique() > 1:
        figure, shown = contours(
            by_heart,
            x="facts",
            y="num_parameters",
            metric="recall",
            guides=bit_guides(BITS_PER_FACT),
            limits=(0.0, 1.0),
        )
        drawn.append(plots.save(folder, "contours", figure, shown, note))
    if "recall" in set(runs.history["key"]) and runs.curves("recall", "step")["x"].nunique() > 1:
        widest = done[done["model.width"] == done["model.width"].max()]
        labelled = Runs(widest, runs.history, runs.notes, runs.root)
        figure, shown = plots.curves_in_panels(labelled, key="recall", by="kind", panels="facts")
        for axis in figure.axes:
            axis.set(title=f"{axis.get_title()} facts", ylim=(-0.02, 1.02))
        drawn.append(plots.save(folder, "in_training", figure, shown, note))
    return drawn


def _of_both_kinds(required: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of those numbers of facts of which both kinds have runs."""
    kinds = required.groupby("facts")["kind"].nunique()
    return required[required["facts"].isin(kinds[kinds == len(NAMES)].index)]


def _required(over: pd.DataFrame, crossing: tuple[float, ...]) -> plt.Figure:
    figure, axis = plt.subplots(layout="constrained")
    for index, (kind, part) in enumerate(over.groupby("kind")):
        colour = f"C{index}"
        low, high = part["median"] - part["low"], part["high"] - part["median"]
        axis.errorbar(part["facts"], part["median"], [low, high], fmt="o-", color=colour, capsize=2)
        for _, row in part[part["bound"] == "above"].iterrows():  # the true value is higher
            axis.annotate(
                "",
                (row["facts"], 1.6 * row["median"]),
                (row["facts"], row["median"]),
                arrowprops={"arrowstyle": "->", "color": colour},
            )
        axis.plot([], [], "o-", color=colour, label=str(kind))
        known = PUBLISHED[str(kind)]
        axis.plot(list(known), list(known.values()), ":", color=colour, label=f"{kind}, published")
    if np.isfinite(crossing[0]):
        axis.axvspan(crossing[1], crossing[2], color="0.8", zorder=0)
        axis.axvline(crossing[0], color="0.5", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="facts", ylabel="parameters for 95% recall")
    axis.legend(fontsize=6)
    return figure


def _unseen(table: pd.DataFrame) -> tuple[plt.Figure, pd.DataFrame]:
    widest = table[table["num_parameters"] == table["num_parameters"].max()].copy()
    widest["people"] = widest["facts"] // 4
    shown = over_seeds(widest, ["kind", "people"], "recall/unseen_train")
    figure, axis = plt.subplots(layout="constrained")
    for kind, part in shown.groupby("kind"):
        axis.errorbar(part["people"], part["mean"], part["std"], fmt="o-", capsize=2, label=kind)
    axis.set(xscale="log", xlabel="people trained on", ylabel="recall of unseen people")
    axis.set_ylim(-0.02, 1.02)
    people = sorted(shown["people"].unique())
    axis.set_xticks(people, labels=[f"{count:g}" for count in people])
    axis.minorticks_off()
    axis.legend()
    return figure, shown
