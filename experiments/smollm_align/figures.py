"""Margin and order of held-out pairs against the distance to the start, by learning rate."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

COLUMNS = ["optim.lr", "seed", "val_reward_margin", "val_reward_accuracy", "pairs/violations"]
FURTHER = ["val_logp_chosen", "val_logp_rejected", "kl_to_start"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    done = done[done["stage"] == "dpo"]
    table = done[[*COLUMNS, *FURTHER]].sort_values(COLUMNS[:2])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, ["optim.lr"], COLUMNS[2], facts=[*COLUMNS[3:], *FURTHER])
    print(shown.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.8), layout="constrained")
    for axis, name in zip(axes, COLUMNS[2:4], strict=True):
        for index, (lr, part) in enumerate(table.groupby("optim.lr")):
            axis.scatter(part["kl_to_start"], part[name], color=f"C{index}", label=f"lr {lr:g}")
        label = name.removeprefix("val_").replace("_", " ")
        axis.set(xlabel="KL to the start (nats a token)", ylabel=label)
    axes[0].legend()
    return [plots.save(folder, "margin", figure, shown, runs.count())]
