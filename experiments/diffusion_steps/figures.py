"""Quality of texts by sampler and number of steps: nats under the true chain, right sums."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.runs import Runs

MEASURES = {"nats": "nats per token under the chain", "right": "part of the sums that are right"}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    table = _by_sampler(runs.finished)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.2), layout="constrained")
    for axis, (measure, name) in zip(axes, MEASURES.items(), strict=True):
        part = table[table["measure"] == measure]
        for algorithm, curve in part.groupby("algorithm"):
            if algorithm == "autoregressive":
                axis.axhline(curve["mean"].mean(), color="black", linestyle=":", label=algorithm)
                continue
            curve = curve.sort_values("steps")
            axis.errorbar(
                curve["steps"], curve["mean"], curve["std"].fillna(0.0), marker="o", label=algorithm
            )
        axis.set(xscale="log", xlabel="forward passes", ylabel=name)
    axes[0].legend()
    return [plots.save(folder, "quality_by_steps", figure, table, runs.count())]


def _by_sampler(done: pd.DataFrame) -> pd.DataFrame:
    """Return measure, algorithm, steps, and mean, std and n of the runs."""
    rows = []
    for name in done.columns:
        kind, _, way = str(name).partition("@")
        measure = kind.removeprefix("samples/")
        if not kind.startswith("samples/") or way.endswith("_stderr") or done[name].isna().all():
            continue
        algorithm, _, steps = way.rpartition("_") if way != "autoregressive" else (way, "", "0")
        values = done[name].dropna()
        rows.append(
            {
                "measure": measure,
                "algorithm": algorithm,
                "steps": int(steps),
                "mean": values.mean(),
                "std": values.std(),
                "n": len(values),
            }
        )
    return pd.DataFrame(rows).sort_values(["measure", "algorithm", "steps"])
