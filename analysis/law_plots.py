"""Figures of scaling laws; each function returns the figure and the table that it shows."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from analysis.envelope import Envelope
from analysis.fit import Fit
from analysis.isoflop import IsoFlop
from analysis.plots import short_flops

_MARKERS = "osD^vPX"


def law_with_residuals(
    points: pd.DataFrame, *, title: str, response: str = "loss"
) -> tuple[Figure, pd.DataFrame]:
    """Return measured against fitted response, residuals below; held-out points are hollow.

    Args:
        points: `Fit.residuals()`.
    """
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(3.3, 3.6), sharex=True, height_ratios=(3, 1)
    )
    for held, part in points.groupby("held_out"):
        style = {"markerfacecolor": "none"} if held else {}
        label = f"{'held out' if held else 'fitted'} (n={len(part)})"
        top.plot(part["predicted"], part["loss"], "o", markersize=3, label=label, **style)
        bottom.plot(part["predicted"], part["residual"], "o", markersize=3, **style)
    ends = [points["predicted"].min(), points["predicted"].max()]
    top.plot(ends, ends, color="0.5", linewidth=0.8)
    bottom.axhline(0.0, color="0.5", linewidth=0.8)
    top.set(ylabel=f"measured {response}", title=title)
    bottom.set(xlabel=f"fitted {response}", ylabel="residual")
    top.legend()
    return figure, points


def isoflop_curves(minima: IsoFlop, *, title: str) -> tuple[Figure, pd.DataFrame]:
    """Return loss against n for each budget, fitted curves and minima; rejected ones are grey."""
    figure, axis = plt.subplots(figsize=(3.3, 3.0))
    rejected = set(minima.budgets.loc[minima.budgets["rejected"] != "", "flops"])
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(minima.budgets)))
    for index, (budget, part) in enumerate(minima.points.groupby("budget")):
        colour = "0.7" if budget in rejected else colours[index]
        note = ", no minimum" if budget in rejected else ""
        label = f"{short_flops(float(str(budget)))}{note}"
        axis.plot(
            part["n"], part["loss"], _MARKERS[index % 7], color=colour, markersize=3, label=label
        )
        curve = minima.curves[minima.curves["flops"] == budget]
        axis.plot(curve["n"], curve["loss"], color=colour, linewidth=0.8)
    accepted = minima.budgets[minima.budgets["rejected"] == ""]
    bars = [accepted["n"] - accepted["n_low"], accepted["n_high"] - accepted["n"]]
    axis.errorbar(
        accepted["n"],
        accepted["loss"],
        xerr=bars,
        fmt="k*",
        markersize=6,
        capsize=2,
        label="best size",
    )
    axis.set(xscale="log", xlabel="parameters", ylabel="validation loss (nats/token)", title=title)
    if len(minima.outliers):
        far = minima.outliers
        axis.plot(far["n"], far["loss"], "o", color="C1", fillstyle="none", label="outlier")
    axis.legend(  # below the axes: the points fill them
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=4,
        fontsize=5,
        title="training FLOPs",
        title_fontsize=5,
    )
    return figure, minima.points


def best_size(approach: IsoFlop | Envelope, *, title: str) -> tuple[Figure, pd.DataFrame]:
    """Return the best n against compute with the fitted power law."""
    figure, axis = plt.subplots(figsize=(3.3, 2.2))
    row = approach.exponents.set_index("quantity").loc["n"]
    if isinstance(approach, IsoFlop):
        shown = approach.budgets[approach.budgets["rejected"] == ""]
        bars = [shown["n"] - shown["n_low"], shown["n_high"] - shown["n"]]
        axis.errorbar(shown["flops"], shown["n"], yerr=bars, fmt="o", capsize=2, label="best size")
    else:
        shown = approach.points
        for used, part in shown.groupby("used"):
            label = "on the envelope" if used else "at the end of the sizes"
            axis.plot(
                part["flops"],
                part["n"],
                ".",
                markersize=2,
                color=None if used else "0.7",
                label=label,
            )
    c = np.geomspace(shown["flops"].min(), shown["flops"].max(), 50)
    label = f"C^{row['exponent']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    axis.plot(c, row["coefficient"] * c ** row["exponent"], color="0.4", linewidth=0.8, label=label)
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="parameters", title=title)
    axis.legend()
    return figure, shown


def profile_curves(profile: pd.DataFrame, *, title: str) -> tuple[Figure, pd.DataFrame]:
    """Return a panel for each parameter: how fast the fit gets worse around its best value."""
    names = list(dict.fromkeys(profile["parameter"]))
    columns = 2
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.3, 0.4 + 1.1 * rows), sharey=True, squeeze=False
    )
    level = stats.chi2.ppf(0.95, 1)
    for axis, name in zip(axes.flat, names, strict=False):
        part = profile[profile["parameter"] == name]
        axis.plot(part["value"], part["statistic"])
        axis.axhline(level, color="0.5", linewidth=0.8, linestyle="--")
        seen = part.loc[part["statistic"] <= 4 * level, "value"]
        axis.set(ylim=(0, 4 * level), xlabel=name)
        _few_ticks(axis, "x", (seen.min(), seen.max()), log=seen.max() > 5 * seen.min() > 0)
        axis.tick_params(labelsize=6)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=8)
    figure.supylabel("likelihood-ratio statistic (dashed: 95%)", fontsize=6)
    return figure, profile


def pair_plot(fitted: Fit, *, title: str) -> tuple[Figure, pd.DataFrame]:
    """Return the bootstrapped parameters against each other; the estimate is the cross.

    Those that are fitted by their logarithm have a logarithmic axis, and of each the middle 99% are
    shown: where a parameter is not determined, a few bootstraps lie far beyond all others.
    """
    law = fitted.law
    draws, best = law.named(fitted.draws), law.named(fitted.theta)
    names = list(law.parameters)
    low, high = np.quantile(fitted.draws, [0.005, 0.995], axis=0)
    margin = 0.05 * np.maximum(high - low, 1e-6)
    lowest, highest = law.named(low - margin), law.named(high + margin)
    shown = {name: (float(lowest[name]), float(highest[name])) for name in names}
    figure, axes = plt.subplots(len(names), len(names), figsize=(5.0, 5.0), squeeze=False)
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            axis = axes[i, j]
            if j > i:
                axis.set_axis_off()
                continue
            if i == j:
                spaced = np.geomspace if row in law.positive else np.linspace
                axis.hist(draws[row], list(spaced(*shown[row], 31)), color="0.6")
                axis.axvline(float(best[row]), color="C1", linewidth=0.8)
            else:
                axis.plot(draws[column], draws[row], ".", markersize=1, alpha=0.3, rasterized=True)
                axis.plot(best[column], best[row], "+", color="C1")
                _few_ticks(axis, "y", shown[row], log=row in law.positive)
            _few_ticks(axis, "x", shown[column], log=column in law.positive)
            axis.tick_params(labelbottom=i == len(names) - 1, labelleft=j == 0 and i > 0)
            if i == len(names) - 1:
                axis.set_xlabel(column)
            if j == 0:
                axis.set_ylabel(row)
    figure.suptitle(title, fontsize=8)
    return figure, pd.DataFrame({name: np.asarray(values) for name, values in draws.items()})


def _few_ticks(axis: Axes, which: str, limits: tuple[float, float], *, log: bool) -> None:
    """Set the limits of axis x or y and two ticks that fit under a small panel."""
    spaced = np.geomspace if log else np.linspace
    ticks = [float(f"{value:.2g}") for value in spaced(*limits, 5)[[1, 3]]]
    axis.set(**{f"{which}scale": "log" if log else "linear"})
    axis.set(**{f"{which}ticks": ticks, f"{which}ticklabels": [_short_tick(t) for t in ticks]})
    axis.set(**{f"{which}lim": limits})
    axis.minorticks_off()


def _short_tick(value: float) -> str:
    """Return a value as a tick label; powers of ten instead of many digits."""
    return f"{value:g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else short_flops(value)
