"""Figures: each is saved as PDF, PNG and the CSV of what it shows."""

from pathlib import Path
from typing import cast

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from analysis.paired import over_seeds
from analysis.runs import Runs

plt.style.use(str(Path(__file__).parent / "style.mplstyle"))

AXES = {
    "step": "optimiser steps",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "wall_s": "wall time (s)",
    "num_parameters": "parameters",
    "loss": "training loss (nats/token)",
    "val_loss": "validation loss (nats/token)",
    "val_bits_per_byte": "validation loss (bits/byte)",
}


def learning_curves(
    runs: Runs, *, key: str = "val_loss", x: str = "step", by: str, axis: Axes | None = None
) -> tuple[Figure, pd.DataFrame]:
    """Return a curve for each value of column `by`: the mean over its runs, a min-max band.

    Args:
        key: the metric; x: step, tokens, flops or wall_s.
        axis: to draw on; None: of a new figure.
    """
    groups = runs.table.set_index("fingerprint")[by]
    curves = runs.curves(key, x)
    curves[by] = curves["fingerprint"].map(groups)
    # Wall time differs between runs: points are matched by rank and shown at their mean time.
    curves["rank"] = curves.groupby("fingerprint").cumcount()
    shown = (
        curves.groupby([by, "rank"])
        .agg(
            x=("x", "mean"),
            mean=("value", "mean"),
            low=("value", "min"),
            high=("value", "max"),
            n=("value", "count"),
        )
        .reset_index()
    )
    axis = plt.subplots()[1] if axis is None else axis
    for name, part in shown.groupby(by):
        n = int(part["n"].max())
        axis.plot(part["x"], part["mean"], marker="o", label=f"{by}={tick(name)} (n={n})")
        if n > 1:
            axis.fill_between(part["x"], part["low"], part["high"], alpha=0.2)
    axis.set(xlabel=AXES.get(x, x), ylabel=AXES.get(key, key))
    if x in ("flops", "tokens"):
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend()
    return cast("Figure", axis.figure), shown


def against_size(
    runs: Runs, *, metric: str = "val_loss", x: str = "num_parameters", by: str
) -> tuple[Figure, pd.DataFrame]:
    """Return the final `metric` against `x`: mean and standard deviation over seeds."""
    shown = over_seeds(runs.finished, [by, x], metric)
    figure, axis = plt.subplots()
    for index, (name, part) in enumerate(shown.groupby(by)):
        n = int(part["n"].min())
        # Series that coincide stay visible: another marker, and each smaller than the one beneath.
        marker, size = "osD^v"[index % 5], max(3, 8 - 3 * index)
        error = part["std"] if n > 1 else None
        axis.errorbar(
            part[x],
            part["mean"],
            _error_bars(error),
            marker=marker,
            markersize=size,
            capsize=2,
            label=f"{name} (n={n})",
        )
    axis.set(xlabel=AXES.get(x, x), ylabel=AXES.get(metric, metric), xscale="log")
    sizes = sorted(shown[x].unique())
    axis.set_xticks(sizes, labels=[short(size) for size in sizes])
    axis.minorticks_off()
    axis.legend(title=by)
    return figure, shown


def forest(
    differences: pd.DataFrame, *, baseline: str, metric: str = "val_loss", confidence: float = 0.95
) -> tuple[Figure, pd.DataFrame]:
    """Return the rows of `paired_difference` as points with intervals, the smallest on top."""
    shown = differences.sort_values("difference", ascending=False).reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(3.3, 0.9 + 0.28 * len(shown)))
    bars = [shown["difference"] - shown["low"], shown["high"] - shown["difference"]]
    axis.errorbar(shown["difference"], range(len(shown)), xerr=bars, fmt="o", capsize=2)
    axis.axvline(0.0, color="0.5", linewidth=0.8)
    axis.set_ylim(-0.5, len(shown) - 0.5)
    axis.set_yticks(
        range(len(shown)), [f"{v} (n={n})" for v, n in zip(shown["value"], shown["n"], strict=True)]
    )
    axis.locator_params(axis="x", nbins=4)
    name, _, unit = AXES.get(metric, metric).partition(" (")
    suffix = f"({unit}, " if unit else ""
    axis.set_xlabel(f"{name} minus {baseline}\n{suffix}{confidence:.0%} interval")
    return figure, shown


def _error_bars(std: pd.Series | None) -> list[float] | None:
    """Return error bars for matplotlib, None where there is one seed."""
    return None if std is None else list(std)


def tick(value: object) -> str:
    """Return a value as a label, large numbers shortened."""
    large = isinstance(value, (int, float)) and abs(value) >= 1000
    return short(float(str(value))) if large else f"{value}"


def short(value: float) -> str:
    """Return 1234567 as 1.23M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def save(folder: Path, name: str, figure: Figure, data: pd.DataFrame, note: str = "") -> Path:
    """Return the path of name.png after writing name.pdf, name.png and name.csv to `folder`.

    Args:
        data: what the figure shows; note: printed under the figure, for example missing cells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if note:
        figure.supxlabel(note, fontsize=5, color="0.4")
    undated = {"CreationDate": None}  # the same figure is the same file
    figure.savefig(folder / f"{name}.pdf", metadata=undated)
    figure.savefig(folder / f"{name}.png")
    data.to_csv(folder / f"{name}.csv", index=False)
    plt.close(figure)
    return folder / f"{name}.png"
