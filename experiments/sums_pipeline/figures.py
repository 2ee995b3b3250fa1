"""What each step of the pipeline gains, and what many samples are worth, beside their cost."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.paired import beside_baseline
from analysis.runs import Runs

NAME = "sums_pipeline"
FACTS = ("pass_at_16", "majority_at_16", "best_at_16", "auc", "auc_within", "wrong_arithmetic")
CURVES = {"pass": "at least one right", "majority": "majority", "best": "the verifier's choice"}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figures, results.csv and curves.csv; return the figures."""
    done = runs.finished.copy()
    done = done[done["work"] == "evaluate"]  # the runs evaluated have the values too
    done["step"] = [
        _step(stage, lr) for stage, lr in zip(done["stage"], done["optim.lr"], strict=True)
    ]
    facts = [f"problems/{name}" for name in FACTS if f"problems/{name}" in done]
    table = beside_baseline(
        done, key="step", baseline="sft", metric="problems/greedy", pair=["seed"], facts=facts
    ).sort_values("mean")
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    curves = pd.DataFrame(_curves(done))
    curves.to_csv(folder.parent / "curves.csv", index=False)
    figures = [plots.save(folder, "gains", _draw_gains(table), table, runs.count())]
    if len(curves):
        figure = _draw_curves(curves)
        figures.append(plots.save(folder, "samples", figure, curves, runs.count()))
    return figures


def _step(stage: str, lr: float) -> str:
    if stage == "solve":
        return "sft"
    name = stage.removeprefix("solve_")
    return f"{name} lr {lr:g}" if name == "dpo" else name


def _curves(done: pd.DataFrame) -> list[dict[str, object]]:
    """Return rows of step, method, samples, tokens, accuracy and its error, means over seeds.

    The error is that over problems, of the mean of seeds that share them.
    """
    rows: list[dict[str, object]] = []
    for step, part in done.groupby("step"):
        for method in CURVES:
            start = f"problems/{method}_at_"
            sizes = [c.removeprefix(start) for c in part if c.startswith(start)]
            for size in sorted(map(int, filter(str.isdigit, sizes))):
                accuracy = part[f"{start}{size}"]
                if accuracy.isna().all():
                    continue
                rows.append(
                    {
                        "step": step,
                        "method": method,
                        "samples": size,
                        "tokens": part[f"problems/tokens_at_{size}"].mean(),
                        "accuracy": accuracy.mean(),
                        "error": part[f"{start}{size}_stderr"].mean(),
                    }
                )
    return rows


def _draw_gains(table: pd.DataFrame) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(5.0, 0.5 + 0.4 * len(table)), layout="constrained")
    axis.errorbar(table["mean"], table["step"], xerr=table["std"].fillna(0.0), fmt="o", capsize=3)
    axis.set(xlabel="share of problems solved greedily", ylim=(-0.5, len(table) - 0.5))
    return figure


def _draw_curves(curves: pd.DataFrame) -> plt.Figure:
    steps = sorted(curves["step"].unique(), key=lambda step: (step != "sft", step))
    figure, axes = plt.subplots(
        1,
        len(steps),
        figsize=(2.9 * len(steps), 2.9),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, step in zip(axes[0], steps, strict=True):
        for index, (method, label) in enumerate(CURVES.items()):
            part = curves[(curves["step"] == step) & (curves["method"] == method)]
            if len(part):
                axis.errorbar(
                    part["tokens"],
                    part["accuracy"],
                    1.96 * part["error"],
                    marker="os^"[index],
                    capsize=2,
                    label=label,
                )
        axis.set(title=step, xlabel="tokens for a problem")
        plots.log_x(axis)
    axes[0][0].set(ylabel="share solved", ylim=(-0.03, 1.03))
    axes[0][0].legend(fontsize=7)
    return figure
