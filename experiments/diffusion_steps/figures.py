"""Quality of texts by sampler and number of steps: right, and likely under chain and judge."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.runs import Runs

PANELS = [  # stage, measure, what it is
    ("sums", "right", "part of the sums that are right"),
    ("sudoku", "right", "part of the puzzles solved"),
    ("chain", "nats", "nats per token under the chain"),
    ("sums", "judge_nats", "sums: nats per token, judge"),
    ("sudoku", "judge_nats", "answers: nats per token, judge"),
]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    table = _by_sampler(runs.finished)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(2, 3, figsize=(9.0, 5.6), layout="constrained")
    for axis, (stage, measure, name) in zip(axes.flat, PANELS, strict=False):
        part = table[(table["stage"] == stage) & (table["measure"] == measure)]
        for algorithm, curve in part.groupby("algorithm"):
            if algorithm == "autoregressive":
                axis.axhline(curve["mean"].mean(), color="black", linestyle=":", label=algorithm)
                continue
            std = curve["std"].fillna(0.0)
            axis.errorbar(curve["steps"], curve["mean"], std, marker="o", label=algorithm)
        axis.set(xscale="log", xlabel="forward passes", ylabel=name)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center")
    return [plots.save(folder, "quality_by_steps", figure, table, runs.count())]


def _by_sampler(done: pd.DataFrame) -> pd.DataFrame:
    """Return stage, measure, algorithm, steps, and mean, std and n of the runs, judges left out."""
    rows = []
    for stage in ("sums", "sudoku", "chain"):
        part = done[done["stage"] == stage]
        for name in part.columns:
            kind, _, way = str(name).partition("@")
            values = part[name].dropna() if kind.startswith("samples/") else part[name][:0]
            if way.endswith("_stderr") or values.empty:
                continue
            algorithm, _, steps = way.rpartition("_") if way != "autoregressive" else (way, "", "0")
            rows.append(
                {
                    "stage": stage,
                    "measure": kind.removeprefix("samples/"),
                    "algorithm": algorithm,
                    "steps": int(steps),
                    "mean": values.mean(),
                    "std": values.std(),
                    "n": len(values),
                }
            )
    return pd.DataFrame(rows).sort_values(["stage", "measure", "algorithm", "steps"])
