"""What the proxies say of mixtures, and what the mixture that they choose is worth."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

SOURCES = ("code", "stories", "encyclopaedia")


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    done = runs.finished.copy()
    fitted = _regression(runs, done)
    proxies = pd.DataFrame([p["weights"] for p in fitted["proxies"]], columns=list(SOURCES))
    proxies["measured"] = [p["val_loss"] for p in fitted["proxies"]]
    logarithms = proxies[list(SOURCES)] @ np.array(fitted["coefficients"])
    proxies["fitted"] = np.exp(logarithms) if fitted["log"] else logarithms
    larger = done[done["stage"].isin(["mixed", "equal", "by_size"])].copy()
    table = over_seeds(larger, ["stage"], "val_loss").sort_values("mean")
    weights = {"mixed": fitted["weights"], "equal": [1, 1, 1], "by_size": [3.57, 2.1, 1.12]}
    for index, source in enumerate(SOURCES):
        table[source] = [weights[s][index] / sum(weights[s]) for s in table["stage"]]
    table.to_csv(folder.parent / "results.csv", index=False)
    print(proxies.to_string(index=False), table.to_string(index=False), sep="\n\n")
    shown = pd.concat([proxies.assign(stage="proxy"), table], ignore_index=True)
    figure = _draw(proxies, larger, table)
    return [plots.save(folder, "mixtures", figure, shown, runs.count())]


def _regression(runs: Runs, done: pd.DataFrame) -> dict[str, Any]:
    """Return what the stage `mix` wrote: outputs/regression.json of its run."""
    (run,) = done.loc[done["stage"] == "mix", "fingerprint"]
    assert runs.root is not None
    file = runs.root / "runs" / run / "outputs" / "regression.json"
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def _draw(proxies: pd.DataFrame, larger: pd.DataFrame, table: pd.DataFrame) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.4))
    left.scatter(proxies["measured"], proxies["fitted"])
    low = proxies[["measured", "fitted"]].min().min()
    high = proxies[["measured", "fitted"]].max().max()
    left.plot([low, high], [low, high], linewidth=0.8, color="0.6", zorder=0)
    for _, row in proxies.iterrows():
        shares = "/".join(f"{100 * row[source]:.0f}" for source in SOURCES)
        left.annotate(
            shares,
            (row["measured"], row["fitted"]),
            textcoords="offset points",
            xytext=(4, -9),
            fontsize=7,
        )
    left.set(
        title=f"8 proxies: % {', '.join(SOURCES)}",
        xlabel=f"measured {plots.AXES['val_loss']}",
        ylabel="fitted",
    )
    left.margins(x=0.18)
    names = list(table["stage"])
    for position, name in enumerate(names):
        values = larger.loc[larger["stage"] == name, "val_loss"]
        right.scatter([position] * len(values), values, color="C0", alpha=0.7)
        right.hlines(values.mean(), position - 0.2, position + 0.2, color="C1")
    labels = [
        name.replace("_", " ") + "\n" + "/".join(f"{100 * row[s]:.0f}" for s in SOURCES)
        for name, (_, row) in zip(names, table.iterrows(), strict=True)
    ]
    right.set_xticks(range(len(names)), labels)
    right.set(title="the larger run, 3 seeds", ylabel=plots.AXES["val_loss"])
    right.margins(x=0.2)
    return figure
