"""Loss added against the bits of keys and values, by format, width and key/value heads."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAME = "kv_bits"
FORMATS = ["int8", "fp8", "nvfp4", "int4", "int2"]
WIDTH, HEADS, KV = "model.width", "model.num_heads", "model.num_kv_heads"
VALUES = ["kv_loss_delta", "kv_kl", "kv_bits", "kv_bytes"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    table = _by_format(runs.finished)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
    for number, ((width, heads, kv), own) in enumerate(table.groupby([WIDTH, HEADS, KV])):
        own = own.set_index("format").loc[FORMATS]
        places = np.arange(len(own)) + 0.12 * (number - 1.5)
        label = f"width {width}, {kv} of {heads} heads"
        axes[0].plot(places, own["kv_kl"], "o", ms=3, label=label)
        ends = own["kv_loss_delta"] - own["least_delta"], own["most_delta"] - own["kv_loss_delta"]
        axes[1].errorbar(places, own["kv_loss_delta"], ends, fmt="o", ms=3, lw=0.8, label=label)
    bits = table.drop_duplicates("format").set_index("format")["kv_bits"]
    names = [f"{name}\n{bits[name]:g}" for name in FORMATS]
    axes[0].set(ylabel="KL from keys and values in full (nats)", yscale="log")
    axes[1].set(ylabel="loss added (nats)")
    axes[1].axhline(0.0, color="0.6", lw=0.6)
    axes[1].legend(fontsize=6, loc="upper left")
    for axis in axes:
        axis.set_xticks(range(len(FORMATS)), names)
        axis.set(xlabel="format, bits of a number of keys and values")
    return [plots.save(folder, NAME, figure, table, runs.count())]


def _by_format(done: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each format and shape: means over seeds, least and most loss added."""
    rows = []
    for name in FORMATS:
        own = done.rename(columns={f"{value}/{name}": value for value in VALUES})
        by = [WIDTH, HEADS, KV]
        table = over_seeds(own, by, "kv_loss_delta", facts=[*VALUES[1:], "kv_bytes/full"])
        spread = own.groupby(by)["kv_loss_delta"].agg(["min", "max"]).reset_index()
        table = table.merge(spread, on=by).rename(
            columns={
                "mean": "kv_loss_delta",
                "kv_bytes/full": "full_bytes",
                "min": "least_delta",
                "max": "most_delta",
            }
        )
        rows.append(table.assign(format=name))
    return pd.concat(rows, ignore_index=True)
