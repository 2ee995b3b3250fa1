"""Figures of tables of runs: heat maps, Pareto fronts, gaps, components, layers."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.errors import require
from analysis.paired import over_seeds
from analysis.plots import AXES, in_order, legend, log_x, tick
from analysis.pooling import is_seed, say_pooled
from analysis.runs import Runs


def heat_map(
    runs: pd.DataFrame, *, x: str, y: str, metric: str = "val_loss", title: str
) -> tuple[Figure, pd.DataFrame]:
    """Return the mean of `metric` over seeds for each x and y, as shades and numbers.

    The best of each row is framed; a hole of the grid has a cross.
    """
    shown = over_seeds(runs, [y, x], metric)
    rows, columns = ([name for name, _ in in_order(shown, runs, axis)] for axis in (y, x))
    grid = shown.pivot(index=y, columns=x, values="mean").reindex(rows, columns=columns)
    figure, axis = plt.subplots(
        figsize=(max(3.3, 0.55 * grid.shape[1] + 1.2), 0.4 * grid.shape[0] + 1.1)
    )
    worst = np.nanquantile(grid.to_numpy(), 0.9)  # one diverged run must not flatten the rest
    mesh = axis.imshow(grid, cmap="viridis_r", aspect="auto", vmax=worst)
    middle = (np.nanmin(grid.to_numpy()) + worst) / 2
    decimals = _decimals(grid.to_numpy())
    for (i, j), value in np.ndenumerate(grid.to_numpy()):
        if np.isnan(value):
            axis.text(j, i, "x", ha="center", va="center", color="0.5")
        else:
            colour = "black" if value < middle else "white"
            axis.text(
                j, i, f"{value:.{decimals}f}", ha="center", va="center", color=colour, fontsize=6
            )
    for i, row in enumerate(grid.to_numpy()):
        if not np.isnan(row).all():
            best = int(np.nanargmin(row))
            frame = Rectangle(
                (best - 0.48, i - 0.46), 0.96, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.5
            )
            axis.add_patch(frame)
    axis.set_xticks(range(grid.shape[1]), [tick(v) for v in grid.columns])
    axis.set_yticks(range(grid.shape[0]), [tick(v) for v in grid.index])
    axis.set(xlabel=AXES.get(x, x), ylabel=AXES.get(y, y), title=title)
    axis.grid(visible=False)
    figure.colorbar(mesh, label=AXES.get(metric, metric), extend="max")
    return figure, shown


def _decimals(values: np.ndarray) -> int:
    """Return the decimals that show three digits of the smallest of `values`, 0 to 4."""
    least = np.nanmin(np.abs(values))
    return int(np.clip(2 - np.floor(np.log10(least)), 0, 4)) if least > 0 else 2


def pareto(
    runs: pd.DataFrame, *, cost: str, metric: str = "val_loss", by: str, title: str
) -> tuple[Figure, pd.DataFrame]:
    """Return `metric` against `cost` (flops, wall_s, peak memory) with the Pareto front.

    The table has a column `front`, True for runs that no other beats in both.
    """
    require(runs, [cost, metric, by])
    shown = runs[[by, cost, metric]].dropna(subset=[cost, metric])
    shown = shown.sort_values([cost, metric]).reset_index(drop=True)
    shown["front"] = _front(shown[metric])
    figure, axis = plt.subplots()
    for index, (name, part) in enumerate(shown.groupby(by, sort=False, dropna=False)):
        axis.plot(
            part[cost],
            part[metric],
            "osD^vPX"[index % 7],
            markersize=3,
            label=f"{tick(name)} (n={len(part)})",
        )
    front = shown[shown["front"]]
    axis.step(front[cost], front[metric], where="post", color="0.4", linewidth=0.8, label="front")
    axis.set(xlabel=AXES.get(cost, cost), ylabel=AXES.get(metric, metric), title=title)
    log_x(axis)
    legend(axis, by)
    return figure, shown


def _front(ascending: "pd.Series[float]") -> "pd.Series[bool]":
    """Return which values, in the order of their cost, none before them reaches."""
    return ascending < ascending.cummin().shift(fill_value=np.inf)


def against_cost(
    runs: pd.DataFrame, *, cost: str, metric: str = "val_loss", by: str, title: str
) -> tuple[Figure, pd.DataFrame]:
    """Return `metric` against `cost` (flops, wall_s, peak_memory_bytes): means over seeds.

    Runs of one value of `by` and one number of parameters are a point, its bar the standard
    deviation. A line joins the points that no other beats in both (column `front`).
    """
    shown = over_seeds(runs, [by, "num_parameters"], metric, facts=[cost])
    shown = shown.dropna(subset=[cost, "mean"]).sort_values([cost, "mean"], ignore_index=True)
    shown["front"] = _front(shown["mean"])
    figure, axis = plt.subplots()
    for index, (name, part) in enumerate(in_order(shown, runs, by)):
        n = int(part["n"].min())
        axis.errorbar(
            part[cost],
            part["mean"],
            part["std"].fillna(0.0),
            fmt="osD^vPX"[index % 7],
            markersize=3.5,
            capsize=2,
            label=f"{tick(name)} (n={n})",
        )
    front = shown[shown["front"]]
    axis.step(front[cost], front["mean"], where="post", color="0.4", linewidth=0.8, label="front")
    axis.set(xlabel=AXES.get(cost, cost), ylabel=AXES.get(metric, metric), title=title)
    log_x(axis)
    legend(axis, by)
    return figure, shown


def gap_against_tokens(
    runs: Runs, *, by: str, baseline: object, pair: list[str], key: str = "val_loss", title: str
) -> tuple[Figure, pd.DataFrame]:
    """Return the relative gap to the baseline over training, in %, paired.

    A curve is the mean over pairs, its band the range.

    Raises:
        ValueError: no run shares `pair` and a number of tokens with the baseline.
    """
    curves = runs.curves(key, "tokens")
    facts = runs.finished.set_index("fingerprint")[[by, *pair]]
    points = curves.join(facts, on="fingerprint", how="inner")
    points["x"] = points["x"].round()
    base = points[points[by] == baseline]
    both = points[points[by] != baseline].merge(
        base[[*pair, "x", "value"]], on=[*pair, "x"], suffixes=("", "_base")
    )
    if both.empty:
        raise ValueError(
            f"no run shares {', '.join(pair)} and a number of tokens with {by}={baseline}"
        )
    both["gap"] = 100 * (both["value"] / both["value_base"] - 1)
    grouped = both.groupby([by, "x"], dropna=False)["gap"]
    shown = grouped.agg(["mean", "min", "max", "count"]).reset_index()
    compared = runs.finished[runs.finished["fingerprint"].isin(points["fingerprint"])]
    say_pooled(shown, compared, [by, *(c for c in pair if not is_seed(c))], key)
    figure, axis = plt.subplots()
    for name, part in shown.groupby(by, sort=False, dropna=False):
        axis.plot(
            part["x"],
            part["mean"],
            marker="o",
            markersize=3,
            label=f"{tick(name)} (n={int(part['count'].max())})",
        )
        if part["count"].max() > 1:
            axis.fill_between(part["x"], part["min"], part["max"], alpha=0.2)
    axis.axhline(0.0, color="0.5", linewidth=0.8)
    axis.set(xlabel="tokens", ylabel=f"gap to {baseline} (%)", title=title)
    log_x(axis)
    legend(axis, by)
    return figure, shown


def waterfall(
    steps: pd.DataFrame, *, metric: str = "val_loss", title: str
) -> tuple[Figure, pd.DataFrame]:
    """Return the changes of a metric as parts are added one after another.

    Args:
        steps: columns step, mean in the order of adding; the first row is the start.
    """
    require(steps, ["step", "mean"])
    shown = steps.reset_index(drop=True).assign(change=steps["mean"].diff().to_numpy())
    figure, axis = plt.subplots(figsize=(3.3, 0.9 + 0.28 * len(shown)))
    first = float(shown["mean"].iloc[0])
    axis.plot([first], [0], "ko", markersize=4)
    means = shown["mean"].to_numpy(dtype=float)
    for i, (before, after) in enumerate(pairwise(means), start=1):
        change = after - before
        axis.barh(i, change, left=before, color="#0072B2" if change < 0 else "#D55E00", height=0.6)
        axis.plot([before, before], [i - 1, i], color="0.5", linewidth=0.6)
        axis.annotate(
            f"{change:+.3f}",
            (max(before, after), i),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
        )
    axis.set_yticks(range(len(shown)), list(shown["step"]))
    axis.invert_yaxis()
    axis.use_sticky_edges = False
    axis.margins(x=0.2)
    axis.set(xlabel=AXES.get(metric, metric), title=title)
    return figure, shown


def by_layer(
    history: pd.DataFrame, *, statistic: str, title: str, step: int | None = None
) -> tuple[Figure, pd.DataFrame]:
    """Return one statistic of the precision diagnostics by layer and GEMM operand at one step.

    Args:
        history: `Runs.history` of one run: keys precision/LAYER/OPERAND/STATISTIC.
        step: None: the last step that has it.

    Raises:
        ValueError: the run has no such statistic; names those that it has.
    """
    diagnostics = history[history["key"].str.startswith("precision/")]
    parts = diagnostics["key"].astype(str).str.rsplit("/", n=2, expand=True)
    known = sorted(parts[2].dropna().unique()) if parts.shape[1] > 2 else []
    if statistic not in known:
        raise ValueError(
            f"no statistic {statistic!r}; there are: "
            f"{', '.join(known) or 'none: set precision.diagnostics_every'}"
        )
    rows = diagnostics.assign(layer=parts[0].str.removeprefix("precision/"), operand=parts[1])
    rows = rows[parts[2] == statistic]
    at = int(rows["step"].max()) if step is None else step
    grid = rows[rows["step"] == at].pivot(index="layer", columns="operand", values="value")
    figure, axis = plt.subplots(
        figsize=(0.6 * grid.shape[1] + 1.9, max(1.8, 0.16 * grid.shape[0] + 0.9))
    )
    values = grid.to_numpy()
    signed = np.nanmin(values) < 0 < np.nanmax(values)
    limit = float(np.nanmax(np.abs(values)))
    norm = TwoSlopeNorm(0.0, -limit, limit) if signed else None
    mesh = axis.imshow(grid, cmap="RdBu_r" if signed else "viridis", norm=norm, aspect="auto")
    axis.set_xticks(range(grid.shape[1]), list(grid.columns), rotation=45, ha="right")
    axis.set_yticks(range(grid.shape[0]), list(grid.index), fontsize=5)
    axis.set_title(f"{title} (step {at})")
    axis.grid(visible=False)
    figure.colorbar(mesh, label=statistic)
    return figure, grid.reset_index()
