"""Contours of a metric over a plane of two quantities, in logarithms of both."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle as cycled
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from contourpy import contour_generator
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.errors import require
from analysis.paired import over_seeds
from analysis.plots import AXES, legend, short


def contour_lines(
    table: pd.DataFrame, *, x: str, y: str, metric: str, levels: Sequence[float]
) -> pd.DataFrame:
    """Return the lines on which the metric has a level: columns level, line, x, y.

    Between the points of the grid the mean over seeds is interpolated, straight in log x and log y.

    Raises:
        ValueError: the runs are no grid of at least two x and two y, or points of it are missing.
    """
    require(table, [x, y, metric])
    grid = table.pivot_table(index=y, columns=x, values=metric, aggfunc="mean")
    if min(grid.shape) < 2 or grid.isna().any(axis=None):
        raise ValueError(
            f"{metric} over {x} and {y} needs a full grid of two values of each at least; it has "
            f"{grid.shape[1]} x {grid.shape[0]} with {int(grid.isna().sum().sum())} missing: run "
            "them, or leave their row or column out"
        )
    made = contour_generator(
        np.log(grid.columns.to_numpy(float)), np.log(grid.index.to_numpy(float)), grid.to_numpy()
    )
    rows = [
        {"level": level, "line": number, "x": float(np.exp(a)), "y": float(np.exp(b))}
        for level in levels
        for number, line in enumerate(made.lines(level))
        for a, b in cast("Sequence[tuple[float, float]]", line)
    ]
    return pd.DataFrame(rows, columns=["level", "line", "x", "y"])


def whole_grid(table: pd.DataFrame, *, x: str, y: str) -> pd.DataFrame:
    """Return the rows of those x that have a row for every y; others would leave holes."""
    sizes = table.groupby(x)[y].nunique()
    return table[table[x].isin(sizes[sizes == table[y].nunique()].index)]


def bit_guides(
    bits_per_fact: float, bits_per_parameter: Sequence[int] = (1, 2)
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return guides for parameters over facts: as many bits a parameter as all facts have."""

    def guide(bits: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda facts: facts * bits_per_fact / bits

    return {f"{bits} bit{'s'[: bits - 1]} a parameter": guide(bits) for bits in bits_per_parameter}


def contours(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    metric: str,
    levels: Sequence[float] = (0.5, 0.95),
    guides: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    limits: tuple[float, float] | None = None,
    axis: Axes | None = None,
) -> tuple[Figure, pd.DataFrame]:
    """Return contour lines of a metric over x and y, and the points that were measured.

    Args:
        guides: further lines by name, y as a function of x.
        limits: the least and the greatest value of the colours (None: those of the metric).
        axis: to draw on; None: of a new figure.
    """
    shown = over_seeds(table, [x, y], metric)
    lines = contour_lines(table, x=x, y=y, metric=metric, levels=levels)
    axis = plt.subplots()[1] if axis is None else axis
    low, high = limits or (None, None)
    points = axis.scatter(
        shown[x], shown[y], c=shown["mean"], cmap="viridis", vmin=low, vmax=high, s=18, zorder=3
    )
    axis.figure.colorbar(points, ax=axis, label=AXES.get(metric, metric))
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for index, (level, part) in enumerate(lines.groupby("level")):
        for number, (_, line) in enumerate(part.groupby("line")):
            label = f"{metric} = {level:g}" if number == 0 else None
            axis.plot(line["x"], line["y"], color=cycle[index % len(cycle)], label=label)
    ends = np.array([shown[x].min(), shown[x].max()], dtype=float)
    for (name, guide), style in zip((guides or {}).items(), cycled(("--", ":", "-."))):
        axis.plot(ends, guide(ends), style, color="0.5", linewidth=0.8, label=name)
    axis.set(xlabel=AXES.get(x, x), ylabel=AXES.get(y, y), xscale="log", yscale="log")
    places = sorted(shown[x].unique())
    axis.set_xticks(places, labels=[short(place) for place in places])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(shown[y].min() / 1.3, shown[y].max() * 1.3)
    legend(axis, "")
    return cast("Figure", axis.figure), shown
