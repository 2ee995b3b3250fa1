"""What is forgotten against what is learnt, by heart and looked up, at the same learning rates."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAMES = {"in_weight": "by heart", "in_tool": "looked up"}
FORGOTTEN = {
    "kl_to_start": "KL to the start (nats a token)",
    "text_loss": "loss on WikiText (nats a token)",
    "hellaswag/acc_norm": "HellaSwag (% of the start)",
}


PUBLISHED = {  # recall and value, SmolLM-135M in full (arXiv 2508.20755)
    "kl_to_start": {"by heart": (1.0, 1.17), "looked up": (0.963, 0.029)},
    "hellaswag/acc_norm": {"by heart": (1.0, 94.0), "looked up": (0.963, 99.8)},
}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    at_start = done["label"].str.startswith("start")
    done["kind"] = done["data.condition"].map(NAMES).where(~at_start, "start")
    there = [name for name in FORGOTTEN if name in done]
    columns = ["kind", "optim.lr", "seed", "recall", "recall/unseen_train", *there, "tv_to_start"]
    table = done[[name for name in columns if name in done]].sort_values(columns[:3])
    table.to_csv(folder.parent / "results.csv", index=False)
    start, taught = table[table["kind"] == "start"], table[table["kind"] != "start"].copy()
    if "hellaswag/acc_norm" in there:  # without the start's there is nothing to compare with
        base = start["hellaswag/acc_norm"].mean()
        taught["hellaswag/acc_norm"] *= 100 / base
    shown = over_seeds(taught, ["kind", "optim.lr"], "kl_to_start", facts=["recall", *there[1:]])
    print(shown.to_string(index=False))
    size = (3.3 * len(there), 2.8)
    figure, axes = plt.subplots(1, len(there), figsize=size, layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], there, strict=True):
        _against_recall(axis, taught, name)
        level = {"kl_to_start": 0.0, "hellaswag/acc_norm": 100.0}.get(name, start[name].mean())
        axis.axhline(level, color="0.5", linestyle="--", linewidth=0.8, label="the start")
    axes[0][0].set_yscale("symlog", linthresh=0.01)
    axes[0][0].set_ylim(0, 2 * axes[0][0].dataLim.ymax)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    return [plots.save(folder, "forgetting", figure, shown, runs.count())]


def _against_recall(axis: Axes, taught: pd.DataFrame, name: str) -> None:
    for index, (kind, part) in enumerate(taught.groupby("kind")):
        colour = f"C{index}"
        for marker, (rate, same) in zip("os^Dv", part.groupby("optim.lr"), strict=False):
            label = f"{kind}, {rate:g}"
            axis.scatter(same["recall"], same[name], color=colour, marker=marker, label=label, s=16)
        if name in PUBLISHED:
            recall, value = PUBLISHED[name][str(kind)]
            axis.scatter(recall, value, color=colour, marker="x", label=f"{kind}, published")
    axis.set(xlabel="recall", ylabel=FORGOTTEN[name], xlim=(-0.05, 1.05))
