"""The poster: loss, cost and latency of each component alone and of all together."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import plots
from analysis.paired import beside_baseline, paired_difference
from analysis.runs import Runs

HERE = Path(__file__).parent
NAME = "hybrid"
ALL = "all three"
ORDER = (
    "dense",
    "experts",
    "memory",
    "hc",
    "mHC",
    "memory + experts",
    "experts + mHC",
    "memory + mHC",
    ALL,
    f"{ALL}, nvfp4",
)
LEFT_OUT = {
    "all of it": "dense",
    "memory": "experts + mHC",
    "experts": "memory + mHC",
    "mHC": "memory + experts",
}
LAYERS = range(4)
TITLES = (
    "Loss",
    "Speed",
    "Memory",
    "Latency at 2M active parameters",
    "What the whole owes to each",
    "Load of the experts",
    "Gain of the residual streams",
    "Gate of the memory",
)
FACTS = (
    "num_parameters",
    "num_active_parameters",
    "tokens_per_s",
    "peak_memory_bytes",
    "state_bytes",
)


def parts_of(row: "pd.Series[Any]") -> str:
    """Return a cell's name, its components."""
    pattern = row["model.pattern"] if isinstance(row["model.pattern"], str) else "af"
    streams = {"hc": "hc", "mhc": "mHC"}.get(row.get("model.streams.kind"))
    parts = [name for name, letter in (("memory", "n"), ("experts", "e")) if letter in pattern]
    parts += [streams] if streams else []
    name = ALL if len(parts) == 3 else " + ".join(parts) or "dense"
    return name if pd.isna(row.get("precision.fprop.x.format")) else f"{name}, nvfp4"


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the poster and results.csv; return the figure."""
    done = runs.finished.copy()
    done["parts"] = [parts_of(row) for _, row in done.iterrows()]
    speeds = runs.history[runs.history["key"] == "tokens_per_s"].groupby("fingerprint")["value"]
    # The fastest step: other work on the machine slows some steps and speeds none.
    done["tokens_per_s"] = done["fingerprint"].map(speeds.max())
    has_all = done["parts"].str.startswith(ALL)
    total = done.loc[has_all, "num_parameters"].iloc[0]
    equal_total = ~has_all & ((done["num_parameters"] / total - 1).abs() < 0.01)
    done["equal"] = np.where(equal_total, "total", "active")
    active = done[done["equal"] == "active"]
    table = beside_baseline(
        active, key="parts", baseline="dense", metric="val_loss", pair=["seed"], facts=FACTS
    )
    table = table.set_index("parts").loc[list(ORDER)].reset_index()
    without = pd.concat(
        [_without(done[has_all | (done["equal"] == kind)], kind) for kind in ("active", "total")]
    )
    table.to_csv(folder.parent / "results.csv", index=False)
    without.to_csv(folder.parent / "left_out.csv", index=False)
    print(table.to_string(index=False), without.to_string(index=False), sep="\n\n")
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.2), layout="constrained", dpi=300)
    _bars(axes[0][0], table, "difference", "loss minus dense (nats/byte, 95%)", error=True)
    _bars(axes[0][1], table, "tokens_per_s", "training, tokens/s of a core")
    _bars(
        axes[0][2],
        table.assign(mb=table["peak_memory_bytes"] / 1e6),
        "mb",
        "peak memory of training (MB)",
    )
    for axis in axes[0][1:3]:
        axis.sharey(axes[0][0])
        axis.tick_params(labelleft=False)
    _latency(axes[0][3], pd.read_csv(HERE / "latency.csv"))
    _left_out(axes[1][0], without)
    _load(axes[1][1], active)
    _by_step(axes[1][2], runs, active, "streams.amax_forward", "Amax gain, forward")
    axes[1][2].set_yscale("log")
    _by_step(axes[1][3], runs, active, "layers.0.engram.gate", "mean gate of the memory")
    for letter, title, axis in zip("abcdefgh", TITLES, axes.flat, strict=True):
        axis.set_title(f"{letter}  {title}", loc="left", fontweight="bold")
    return [plots.save(folder, NAME, figure, table, runs.count())]


def _bars(
    axis: plt.Axes, table: pd.DataFrame, column: str, label: str, *, error: bool = False
) -> None:
    bars = [table["difference"] - table["low"], table["high"] - table["difference"]]
    colors = ["C1" if name.startswith(ALL) else "C0" for name in table["parts"]]
    axis.barh(
        range(len(table)),
        table[column],
        xerr=bars if error else None,
        color=colors,
        error_kw={"linewidth": 0.8},
    )
    axis.set_yticks(range(len(table)), table["parts"])
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.axvline(0.0, color="0.4", linewidth=0.8)
    axis.set_xlabel(label)


def _latency(axis: plt.Axes, latency: pd.DataFrame) -> None:
    for index, (name, part) in enumerate(latency.groupby("model", sort=False)):
        axis.plot(
            part["context"],
            part["ms_per_token"],
            marker="os^vD<>pX*"[index],
            label=name,
            **_line(index),
        )
    contexts = sorted(latency["context"].unique())
    axis.set(
        xscale="log", yscale="log", xlabel="context (tokens)", ylabel="decoding (ms per token)"
    )
    axis.set_xticks(contexts, labels=[str(c) for c in contexts])
    axis.minorticks_off()
    ticks = [4, 8, 16, 32]
    axis.set_yticks(ticks, labels=[str(t) for t in ticks])
    axis.set_ylim(None, 60)
    axis.legend(ncols=2, fontsize=5, loc="upper left")


def _without(done: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return what leaving out each part costs at equal parameters, `kind` of them."""
    compared = done[done["parts"].isin([ALL, *LEFT_OUT.values()])]
    gap = paired_difference(compared, key="parts", baseline=ALL, metric="val_loss", pair=["seed"])
    names = pd.DataFrame(LEFT_OUT.items(), columns=["left_out", "value"])
    return names.merge(gap, on="value").assign(equal=kind)


def _left_out(axis: plt.Axes, without: pd.DataFrame) -> None:
    for index, (kind, part) in enumerate(without.groupby("equal")):
        heights = np.arange(len(part)) + 0.24 * (index - 0.5)
        bars = [part["difference"] - part["low"], part["high"] - part["difference"]]
        axis.errorbar(
            part["difference"],
            heights,
            xerr=bars,
            fmt="os"[index],
            capsize=2,
            label=f"equal {kind} parameters",
        )
    axis.set_yticks(range(len(LEFT_OUT)), LEFT_OUT)
    axis.set_ylim(len(LEFT_OUT) - 0.4, -0.6)
    axis.axvline(0.0, color="0.4", linewidth=0.8)
    axis.set_xlabel(f"loss without it minus {ALL} (nats/byte, 95%)")
    axis.legend(fontsize=6)


def _load(axis: plt.Axes, done: pd.DataFrame) -> None:
    for index, name in enumerate(ORDER):
        if "experts" in name or name.startswith(ALL):
            part = done[done["parts"] == name]
            entropy = [part[f"layers.{layer}.moe.load_entropy"].mean() for layer in LAYERS]
            axis.plot(LAYERS, entropy, marker="o", label=name, **_line(index))
    axis.set(xlabel="layer", ylabel="entropy of the experts' load (1: even)", xticks=LAYERS)
    axis.legend(fontsize=5)


def _by_step(axis: plt.Axes, runs: Runs, done: pd.DataFrame, metric: str, label: str) -> None:
    curves = runs.curves(metric, "step").merge(done[["fingerprint", "parts"]], on="fingerprint")
    for index, name in enumerate(ORDER):
        part = curves[curves["parts"] == name]
        if len(part):
            axis.plot(part.groupby("x")["value"].mean(), label=name, **_line(index))
    axis.set(xlabel="optimiser steps", ylabel=label)
    axis.legend(fontsize=5)


def _line(index: int) -> dict[str, Any]:
    """Return the style of a line: dashes where the seven colours repeat."""
    return {"color": f"C{index % 7}", "linestyle": "--" if index > 6 else "-"}
