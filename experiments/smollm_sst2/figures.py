"""Accuracy on SST-2 by prompting and by fine-tuning, plain and calibrated."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

FACTS = ["sst2/accuracy_stderr", "sst2/f1", "sst2/accuracy_calibrated", "sst2/log_loss"]
LABELS = {"sst2/accuracy": "as it is", "sst2/accuracy_calibrated": "calibrated"}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    table = over_seeds(done, ["stage"], "sst2/accuracy", facts=FACTS).sort_values("mean")
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axis = plt.subplots(figsize=(5.0, 0.8 + 0.4 * len(table)), layout="constrained")
    for index, (name, label) in enumerate(LABELS.items()):
        values = table["mean"] if name == "sst2/accuracy" else table[name]
        error = 1.96 * table["sst2/accuracy_stderr"]
        rows = [row + 0.24 * (0.5 - index) for row in range(len(table))]
        axis.errorbar(values, rows, xerr=error, fmt="os"[index], capsize=3, label=label)
    axis.set(xlabel="share of right labels, 95% over sentences", ylim=(-0.5, len(table) - 0.5))
    axis.set_yticks(range(len(table)), table["stage"])
    figure.legend(loc="outside upper center", ncols=2, fontsize=7)
    return [plots.save(folder, "accuracy", figure, table, runs.count())]
