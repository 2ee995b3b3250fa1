"""Figures: each is saved as PDF, PNG and the CSV of what it shows."""

import json
import math
import re
import textwrap
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from analysis.paired import over_seeds
from analysis.pooling import POOLED, say_pooled
from analysis.runs import Runs
from analysis.tables import EMPTY

plt.style.use(str(Path(__file__).parent / "style.mplstyle"))

# Of a figure as wide as a column, 3.3 inch.
_LETTERS = 50  # in a row of the legend
_LABELS_INCH = 0.4  # height of the tick labels and the label of the horizontal axis
_NAME = 24  # letters beside an axis
_LABEL_WIDTH = 0.12  # of a tick's label, in widths of the axis
_NO_UNIT = 1e12  # from here on B is no familiar unit
_NOTE_LETTERS = 26  # in an inch of the note under a figure
_HASH = re.compile(r"[0-9a-f]{16,}")
_FEW = 30.0  # a logarithmic axis over less than this shows too few powers of ten

AXES = {
    "step": "optimiser steps",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "wall_s": "wall time (s)",
    "peak_memory_bytes": "peak memory (bytes)",
    "num_parameters": "parameters",
    "loss": "training loss (nats/token)",
    "val_loss": "validation loss (nats/token)",
    "val_bound": "upper bound of the validation loss (nats/token)",
    "val_infill_loss": "weighted loss of hidden middles (nats/token)",
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
    curves = curves[curves["fingerprint"].isin(groups.index)]
    curves[by] = curves["fingerprint"].map(groups)
    # Wall time differs between runs: points are matched by rank and shown at their mean time.
    curves["rank"] = curves.groupby("fingerprint").cumcount()
    shown = (
        curves.groupby([by, "rank"], dropna=False)
        .agg(
            x=("x", "mean"),
            mean=("value", "mean"),
            low=("value", "min"),
            high=("value", "max"),
            n=("value", "count"),
        )
        .reset_index()
    )
    say_pooled(shown, runs.table[runs.table["fingerprint"].isin(curves["fingerprint"])], [by], key)
    axis = plt.subplots()[1] if axis is None else axis
    colours = _colours(runs.table, by)
    for name, part in in_order(shown, runs.table, by):
        n, colour = int(part["n"].max()), colours[tick(name)]
        label = f"{tick(name)} (n={n})"
        axis.plot(part["x"], part["mean"], marker="o", color=colour, label=label)
        if n > 1:
            axis.fill_between(part["x"], part["low"], part["high"], color=colour, alpha=0.2)
    axis.set(xlabel=AXES.get(x, x), ylabel=AXES.get(key, key))
    if x in ("flops", "tokens"):
        log_x(axis)
    legend(axis, by)
    return cast("Figure", axis.figure), shown


def curves_in_panels(
    runs: Runs, *, key: str = "val_loss", x: str = "step", by: str, panels: str
) -> tuple[Figure, pd.DataFrame]:
    """Return `learning_curves` by `by` in a panel for each value of column `panels`."""
    parts = in_order(runs.table, runs.table, panels)
    columns = math.ceil(math.sqrt(len(parts)))
    rows = -(-len(parts) // columns)
    size = (2.1 * columns + 1.0, 1.7 * rows + 0.5)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=x == "step", sharey=True, squeeze=False
    )
    shown = []
    for axis, (name, table) in zip(axes.flat, parts, strict=False):
        table.attrs |= runs.table.attrs
        _, data = learning_curves(replace(runs, table=table), key=key, x=x, by=by, axis=axis)
        shown.append(pd.concat({name: data}, names=[panels]).reset_index(panels))
        axis.set_title(tick(name))
        axis.get_legend().remove()
        axis.label_outer()
    for axis in axes.flat[len(parts) :]:
        axis.remove()
    handles = {label: h for a in figure.axes for h, label in _series_of(a)}
    figure.legend(handles.values(), handles, title=by, loc="outside right upper")
    return figure, pd.concat(shown, ignore_index=True)


def _series_of(axis: Axes) -> list[tuple[Any, str]]:
    """Return the handles of an axis with the names of their series, without the count."""
    handles, labels = axis.get_legend_handles_labels()
    return [(h, label.rpartition(" (n=")[0]) for h, label in zip(handles, labels, strict=True)]


def against_size(
    runs: Runs, *, metric: str = "val_loss", x: str = "num_parameters", by: str
) -> tuple[Figure, pd.DataFrame]:
    """Return the final `metric` against `x`: mean and standard deviation over seeds."""
    shown = over_seeds(runs.finished, [by, x], metric)
    figure, axis = plt.subplots()
    colours = _colours(runs.table, by)
    for index, (name, part) in enumerate(in_order(shown, runs.table, by)):
        n = int(part["n"].min())
        # Series that coincide stay visible: another marker, and each smaller than the one beneath.
        marker, size = "osD^v"[index % 5], max(3.0, 5.5 - index)
        error = part["std"] if n > 1 else None
        axis.errorbar(
            part[x],
            part["mean"],
            _error_bars(error),
            marker=marker,
            markersize=size,
            color=colours[tick(name)],
            capsize=2,
            label=f"{tick(name)} (n={n})",
        )
    axis.set(xlabel=AXES.get(x, x), ylabel=AXES.get(metric, metric), xscale="log")
    sizes = sorted(shown[x].dropna().unique())
    axis.set_xticks(sizes, labels=_apart(sizes))
    axis.minorticks_off()
    legend(axis, by)
    return figure, shown


def _colours(table: pd.DataFrame, by: str) -> dict[str, str]:
    """Return the colour of each value of a column, the same in all figures of these runs."""
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    return {name: cycle[index % len(cycle)] for index, name in enumerate(_names(table, by))}


def in_order(
    shown: pd.DataFrame, table: pd.DataFrame, by: str
) -> list[tuple[Hashable, pd.DataFrame]]:
    """Return the groups of `shown` by the values of `by`: numbers ascending, names as in `table`.

    The table of a sweep has its cells as its grid was written.
    """
    names = _names(table, by)
    groups = [(name, part) for name, part in shown.groupby(by, dropna=False)]
    return sorted(groups, key=lambda group: names.index(tick(group[0])))


def _names(table: pd.DataFrame, by: str) -> list[str]:
    """Return the values of a column as labels, in the order of `in_order`."""
    values = table[by].drop_duplicates()
    if pd.api.types.is_numeric_dtype(values):
        values = values.sort_values()
    return [tick(value) for value in values]


def legend(axis: Axes, title: str) -> None:
    """Name the series of `axis`: below it, where they hide no point, if it has the figure alone."""
    handles, labels = axis.get_legend_handles_labels()
    figure = cast("Figure", axis.figure)
    if len(figure.axes) > 1 or not labels:
        axis.legend(title=title)
        return
    labels = [textwrap.fill(label, _LETTERS) for label in labels]
    letters = max(len(line) for label in labels for line in label.split("\n")) + 6  # the handle's
    columns = max(1, min(len(labels), _LETTERS // letters))
    rows = -(-sum(label.count("\n") + 1 for label in labels) // columns) + 1
    figure.set_figheight(figure.get_figheight() + 0.13 * rows)
    below = axis.transAxes + ScaledTranslation(0.0, -_LABELS_INCH, figure.dpi_scale_trans)
    axis.legend(
        handles,
        labels,
        title=title,
        ncols=columns,
        loc="upper right",
        bbox_to_anchor=(1.0, 0.0),
        bbox_transform=below,
    )


def log_x(axis: Axes) -> None:
    """Make the horizontal axis logarithmic, with a number at 1, 2 and 5 where decades are few."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    if high / low >= _FEW:
        axis.xaxis.set_minor_formatter(NullFormatter())
        return
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    shortened = short if high < _NO_UNIT else short_flops
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shortened(value)))
    axis.xaxis.set_minor_locator(NullLocator())


def _apart(sizes: list[float]) -> list[str]:
    """Return labels of ticks on a logarithmic axis, "" where it would touch the one before."""
    labels, last = [], 0.0
    for size in sizes:
        free = size >= last * (sizes[-1] / sizes[0]) ** _LABEL_WIDTH
        labels.append(short(size) if free else "")
        last = size if free else last
    return labels


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
    values = [textwrap.fill(tick(value), _NAME) for value in shown["value"]]
    axis.set_yticks(
        range(len(shown)), [f"{v} (n={n})" for v, n in zip(values, shown["n"], strict=True)]
    )
    axis.locator_params(axis="x", nbins=4)
    name, _, unit = AXES.get(metric, metric).partition(" (")
    suffix = f"({unit}, " if unit else ""
    told = f"{confidence:.0%} interval" if shown["low"].notna().any() else "too few for an interval"
    axis.set_xlabel(f"{name} minus {baseline}\n{suffix}{told}")
    return figure, shown


def _error_bars(std: pd.Series | None) -> list[float] | None:
    """Return error bars for matplotlib, None where there is one seed."""
    return None if std is None else list(std)


def tick(value: object) -> str:
    """Return a value as a label: numbers in four digits, large ones shortened."""
    if pd.isna(value):  # type: ignore[call-overload]
        return EMPTY
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        number = float(value)
        return short(number) if abs(number) >= 1000 else f"{number:.4g}"
    return _without_brackets(str(value))


def _without_brackets(text: str) -> str:
    """Return a list of objects in JSON, as data.sources is, as `key=value` words; else `text`."""
    try:
        parts = json.loads(text) if text.startswith("[{") else None
    except ValueError:
        parts = None
    if not parts:
        return text
    words = (" ".join(f"{k}={_HASH.sub(_begin, str(v))}" for k, v in p.items()) for p in parts)
    return "; ".join(words)


def _begin(digest: re.Match[str]) -> str:
    return digest[0][:6]


def short(value: float) -> str:
    """Return 1234567 as 1.23M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def short_flops(value: float) -> str:
    """Return 3e+12 as 3e12; large numbers of FLOPs have no familiar unit."""
    mantissa, _, power = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(power)}" if power else short(value)


def save(folder: Path, name: str, figure: Figure, data: pd.DataFrame, note: str = "") -> Path:
    """Return the path of name.png after writing name.pdf, name.png and name.csv to `folder`.

    Args:
        data: what the figure shows; note: printed under the figure, for example missing cells, and
            after it what `data` pools.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notes = filter(None, (note, data.attrs.get(POOLED)))
    letters = int(figure.get_figwidth() * _NOTE_LETTERS)
    lines = [line for text in notes for line in textwrap.wrap(text, letters)]
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=5, color="0.4")
    undated = {"CreationDate": None}  # the same figure is the same file
    figure.savefig(folder / f"{name}.pdf", metadata=undated)
    figure.savefig(folder / f"{name}.png")
    data.to_csv(folder / f"{name}.csv", index=False)
    plt.close(figure)
    return folder / f"{name}.png"
