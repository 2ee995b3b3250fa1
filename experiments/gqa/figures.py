"""Loss and memory of decoding against key/value heads at equal parameters, paired by seed."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import beside_baseline
from analysis.runs import Runs

NAME = "gqa"
KEY = "model.num_kv_heads"


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    table = beside_baseline(
        done,
        key=KEY,
        baseline=8,
        metric="val_loss",
        pair=["seed"],
        facts=["num_parameters", "state_bytes"],
    )
    table["state_ratio"] = table["state_bytes"] / table["state_bytes"].max()
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.8), layout="constrained")
    axes[0].errorbar(table[KEY], table["mean"], table["std"], marker="o", capsize=2)
    axes[0].scatter(done[KEY], done["val_loss"], s=8, color="0.6", zorder=0, label="each seed")
    axes[0].set(ylabel=plots.AXES["val_loss"])
    axes[0].legend()
    axes[1].plot(table[KEY], table["state_bytes"] / 1024, marker="o")
    proportional = table["state_bytes"].max() / 1024 * table[KEY] / 8
    axes[1].plot(table[KEY], proportional, color="0.6", linestyle="--", label="n_kv / n_h")
    axes[1].set(ylabel="keys and values of 128 tokens (KiB)", ylim=(0, None))
    axes[1].legend()
    for axis in axes:
        axis.set(xscale="log", xlabel="key/value heads of 8")
        axis.set_xticks(table[KEY], labels=[str(n) for n in table[KEY]])
        axis.minorticks_off()
    return [plots.save(folder, NAME, figure, table, runs.count())]
