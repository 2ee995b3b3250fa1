"""Classes and statistics of the order in which texts appear, by prompt."""

import json
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.reveal_order import order_of
from analysis.runs import Runs

NAMES = {"#": "stdin program", "d": "function", "a": "prediction of an output"}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    assert runs.root is not None, "orders.json is in the run folders"
    rows = []
    for run in runs.finished["fingerprint"]:
        for text in json.loads((runs.root / "runs" / run / "orders.json").read_text()):
            rows.append(
                {"prompt": NAMES[text["prompt"][0]], **asdict(order_of(text["revealed_at"]))}
            )
    orders = pd.DataFrame(rows)
    shares = pd.crosstab(orders["prompt"], orders["kind"], normalize="index")
    means = orders.groupby("prompt")[["tau", "jump", "sketch", "runs"]].agg(["mean", "std"])
    means.columns = [f"{name}_{which}" for name, which in means.columns]
    table = shares.join(means).join(orders.groupby("prompt").size().rename("n")).reset_index()
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
    shares.plot.barh(stacked=True, ax=axis)
    axis.set(xlabel="part of the texts", ylabel="")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    axis.get_legend().remove()
    return [plots.save(folder, "classes", figure, table, runs.count())]
