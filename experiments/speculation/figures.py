"""Acceptance and speed-up against the size of the draft; tokens a round against the formula."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAME = "speculation"
WIDTH, DRAFT = "model.width", "work.draft"
TEMPERATURES = {"0": "greedy", "1": "temperature 1"}
LENGTH = 4  # tokens that a draft proposes
VALUES = ["accepted", "overlap", "round_tokens", "expected", "gap", "speed_up", "rounds"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    table = _by_draft(runs.finished)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.4), layout="constrained")
    for (name, label), marker in zip(TEMPERATURES.items(), "os", strict=True):
        own = table[table["temperature"] == name]
        for axis, column in zip(axes[:2], ("accepted", "speed_up"), strict=True):
            axis.plot(own.apply(_named, axis=1), own[column], marker, ms=4, label=label)
        axes[2].scatter(own["expected"], own["round_tokens"], s=12, marker=marker, label=label)
    cells = own[own["size_ratio"].notna()]
    ideal = cells["round_tokens"] / (LENGTH * cells["size_ratio"] + 1)
    names = cells.apply(_named, axis=1)
    axes[1].plot(names, ideal, "x", color="0.5", label="temperature 1, if steps cost as weights")
    axes[0].set(ylabel="proposals accepted", ylim=(0.0, 1.0))
    axes[1].set(ylabel="speed-up (CPU seconds)", ylim=(0.0, None))
    axes[1].axhline(1.0, color="black", lw=0.6)
    for axis in axes[:2]:
        axis.tick_params(axis="x", rotation=60, labelsize=7)
    ends = [table["expected"].min(), table["expected"].max()]
    axes[2].plot(ends, ends, color="0.6", lw=0.8, label="formula")
    axes[2].set(xlabel="expected tokens a round", ylabel="measured")
    for axis in axes[1:]:
        axis.legend(fontsize=6)
    return [plots.save(folder, NAME, figure, table, runs.count())]


def _named(row: pd.Series) -> str:
    """Return the name of a draft, with the part of the target's weights that it has."""
    return (
        row["draft"] if pd.isna(row["size_ratio"]) else f"{row['draft']}, {row['size_ratio']:.0%}"
    )


def _by_draft(done: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each draft and temperature, means over seeds."""
    pairs = done[done["accepted/0"].notna()].copy()
    ratio = pairs.get("size_ratio", pd.Series(float("nan"), index=pairs.index))
    cells = "width " + pairs[WIDTH].map("{:.0f}".format)
    pairs["draft"] = pairs[DRAFT].where(pairs[DRAFT].notna(), cells)
    pairs["size_ratio"] = ratio.where(pairs[DRAFT].isna())
    tables = []
    for name in TEMPERATURES:
        own = pairs.rename(columns={f"{value}/{name}": value for value in VALUES})
        facts = ["size_ratio", "cost", *VALUES[1:]]
        table = over_seeds(own, ["draft"], "accepted", facts=facts, over=[WIDTH])
        tables.append(table.rename(columns={"mean": "accepted"}).assign(temperature=name))
    return pd.concat(tables, ignore_index=True).sort_values(["temperature", "size_ratio"])
