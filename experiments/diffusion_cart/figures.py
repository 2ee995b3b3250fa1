"""The bound and the right sums by the weight of the hidden tokens in training."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import beside_baseline
from analysis.runs import Runs


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    right = [
        c for c in done.columns if str(c).startswith("samples/right@") and "_std" not in str(c)
    ]
    table = beside_baseline(
        done, key="task.weight", baseline="bound", metric="val_bound", pair=["seed"], facts=right
    )
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axis = plt.subplots(figsize=(4.5, 3.0), layout="constrained")
    curves = runs.curves("val_bound", "step")
    weights = curves["fingerprint"].map(done.set_index("fingerprint")["task.weight"])
    for weight, part in curves.groupby(weights):
        mean = part.groupby("x")["value"].mean()
        axis.plot(mean.index, mean, marker=".", label=weight)
    axis.set(xlabel="step", ylabel="bound (nats per byte)")
    axis.legend(title="weight")
    return [plots.save(folder, "bound_by_weight", figure, table, runs.count())]
