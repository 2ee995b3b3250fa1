"""Loss by position, up to four times the trained length, by the keys that a query sees."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import plots
from analysis.runs import Runs

NAME = "sinks"
TRAINED = 256
BIN = 32
NAMES = {
    "af": "all keys",
    "wf": "last 256",
    "sf": "first 4, last 252",
    "rf": "the same, positions in the cache",
    "lf": "all keys, learned sink",
}


def by_position(runs: Runs, done: pd.DataFrame) -> pd.DataFrame:
    """Return the mean loss of each bin of positions, for each run."""
    rows = runs.positions().merge(done[["fingerprint", "keys", "seed"]], on="fingerprint")
    rows["position"] = rows["position"] // BIN * BIN
    rows["nats"] = rows["loss"] * rows["n"]
    binned = rows.groupby(["keys", "seed", "position"])[["nats", "n"]].sum()
    return (binned["nats"] / binned["n"]).rename("loss").reset_index()


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    done = done[done["train.steps"] == 0].copy()
    done["keys"] = [NAMES[p] if isinstance(p, str) else NAMES["af"] for p in done["model.pattern"]]
    losses = by_position(runs, done)
    losses["beyond"] = np.where(losses["position"] < TRAINED, "loss_within", "loss_beyond")
    means = losses.groupby(["keys", "seed", "beyond"])["loss"].mean().unstack().reset_index()
    table = means.merge(done[["keys", "seed", "sample_repetition"]], on=["keys", "seed"])
    table = (
        table.groupby("keys")
        .agg(
            loss_within=("loss_within", "mean"),
            loss_beyond=("loss_beyond", "mean"),
            sd_beyond=("loss_beyond", "std"),
            repetition=("sample_repetition", "mean"),
            sd_repetition=("sample_repetition", "std"),
            n=("seed", "count"),
        )
        .reindex([name for name in NAMES.values() if name in set(done["keys"])])
        .reset_index()
    )
    table["perplexity_beyond"] = np.exp(table["loss_beyond"])
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.0), layout="constrained", width_ratios=[2, 1])
    for index, keys in enumerate(NAMES.values()):
        part = losses[losses["keys"] == keys]
        curve = np.exp(part.groupby("position")["loss"].mean())
        axes[0].plot(
            curve.index + BIN / 2,
            curve,
            color=f"C{index}",
            marker="os^vD"[index],
            markersize=3,
            label=keys,
        )
    axes[0].axvline(TRAINED, color="0.6", linewidth=0.8)
    axes[0].set(xlabel="position (trained up to the line)", ylabel="perplexity of a token")
    axes[0].legend()
    axes[1].barh(
        range(len(table)),
        table["repetition"],
        xerr=table["sd_repetition"],
        color=[f"C{i}" for i in range(len(table))],
    )
    axes[1].set_yticks(range(len(table)), table["keys"])
    axes[1].invert_yaxis()
    axes[1].set(xlabel="4-grams said before, of 768 tokens")
    shown = losses.groupby(["keys", "position"])["loss"].agg(["mean", "std"]).reset_index()
    return [plots.save(folder, NAME, figure, shown, runs.count())]
