"""BDH beside GPTs of equal parameters and of equal FLOPs: losses and exponents of power laws."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAME = "bdh"
SERIES = ("BDH", "GPT, equal parameters", "GPT, equal FLOPs")


def series(row: "pd.Series[Any]") -> str:
    """Return the name of a run's series."""
    if row["model._target_"].endswith("BDHConfig"):
        return SERIES[0]
    return SERIES[1] if row["model.width"] <= 64 else SERIES[2]


def power_law(part: pd.DataFrame, x: str) -> tuple[float, float, float, float]:
    """Return (exponent, low, high, loss at x = 1) of loss against `x`.

    The 95% interval is Student's t of the seeds about the mean of their size.
    """
    losses = np.log(part.pivot(index=x, columns="seed", values="val_loss"))
    log_x = np.log(losses.index.to_numpy(dtype=float))
    slope, start = np.polyfit(log_x, losses.mean(axis=1), 1)
    about = losses.sub(losses.mean(axis=1), axis=0).to_numpy()
    free = about.size - len(about)
    variance = (
        np.square(about).sum() / free / about.shape[1] / np.square(log_x - log_x.mean()).sum()
    )
    half = float(stats.t.ppf(0.975, free) * np.sqrt(variance))
    return float(slope), float(slope) - half, float(slope) + half, float(np.exp(start))


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure, results.csv and exponents.csv; return the figure."""
    done = runs.finished.copy()
    done["series"] = [series(row) for _, row in done.iterrows()]
    done["mflop_per_token"] = done["flops"] / done["tokens"] / 1e6
    by = ["series", "num_parameters"]
    facts = ["mflop_per_token", "tokens_per_s", "wall_s", "peak_memory_bytes"]
    table = over_seeds(done, by, "val_loss", facts=facts)
    fits = pd.DataFrame(
        [
            (name, x, *power_law(done[done["series"] == name], x))
            for name in SERIES
            for x in ("num_parameters", "mflop_per_token")
        ],
        columns=["series", "against", "exponent", "low", "high", "loss_at_1"],
    )
    fits.to_csv(folder.parent / "exponents.csv", index=False)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False), fits.to_string(index=False), sep="\n\n")
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.9), layout="constrained", sharey=True)
    labels = {"num_parameters": "parameters", "mflop_per_token": "training MFLOP per token"}
    for axis, (x, label) in zip(axes, labels.items(), strict=True):
        for index, name in enumerate(SERIES):
            part = table[table["series"] == name].sort_values(x)
            law = fits[(fits["series"] == name) & (fits["against"] == x)].iloc[0]
            axis.errorbar(
                part[x],
                part["mean"],
                part["std"],
                marker="os^"[index],
                capsize=2,
                linestyle="",
                color=f"C{index}",
                label=f"{name}: {law['exponent']:.3f}",
            )
            fitted = law["loss_at_1"] * part[x] ** law["exponent"]
            axis.plot(part[x], fitted, color=f"C{index}", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.legend(title="exponent")
        axis.yaxis.set_major_formatter(plt.ScalarFormatter())
        axis.yaxis.set_minor_formatter(plt.ScalarFormatter())
        axis.xaxis.set_minor_formatter(plt.NullFormatter())
    axes[0].set_ylabel("validation loss (nats/byte)")
    return [plots.save(folder, NAME, figure, table, runs.count())]
