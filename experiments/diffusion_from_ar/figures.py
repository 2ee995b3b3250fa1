"""The bound against tokens of diffusion, from a model of next tokens and from scratch."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

STAGES = {"adapted": "-", "opened": "--", "scratch": ":"}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished[runs.finished["stage"].isin(STAGES)]
    table = over_seeds(done, ["stage", "optim.lr"], "val_bound")
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    curves = runs.curves("val_bound", "tokens").merge(
        done[["fingerprint", "stage", "optim.lr"]], on="fingerprint"
    )
    figure, axis = plt.subplots(figsize=(5.0, 3.2), layout="constrained")
    rates = sorted(curves["optim.lr"].unique())
    for (stage, rate), part in curves.groupby(["stage", "optim.lr"]):
        mean = part.groupby("x")["value"].mean()
        colour = f"C{rates.index(rate)}"
        axis.plot(mean.index, mean, STAGES[stage], color=colour, label=f"{stage}, lr {rate:g}")
    axis.set(xlabel="tokens of diffusion", ylabel="bound (nats per byte)")
    axis.legend()
    return [plots.save(folder, "bound_by_tokens", figure, table, runs.count())]
