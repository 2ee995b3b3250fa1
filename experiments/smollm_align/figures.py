"""Margin and order of held-out pairs, and the win rate, against the distance to the start."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

COLUMNS = ["optim.lr", "seed", "val_reward_margin", "val_reward_accuracy", "pairs/violations"]
FURTHER = ["val_logp_chosen", "val_logp_rejected", "kl_to_start"]
JUDGED = ["win_rate/wins", "win_rate/tokens", "win_rate/tokens_start", "verifier_auc"]
SHOWN = {
    "val_reward_margin": "reward margin",
    "val_reward_accuracy": "pairs in the right order",
    "win_rate/wins": "answers that the verifier prefers",
}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    verifiers = done[done["stage"] == "verifier"].set_index("seed")["val_auc"]
    done = done[done["stage"] == "dpo"].copy()
    done["verifier_auc"] = done["seed"].map(verifiers)
    table = done[[*COLUMNS, *FURTHER, *JUDGED]].sort_values(COLUMNS[:2])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, ["optim.lr"], COLUMNS[2], facts=[*COLUMNS[3:], *FURTHER, *JUDGED])
    print(shown.to_string(index=False))
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(9.6, 2.8), layout="constrained")
    for axis, (name, label) in zip(axes, SHOWN.items(), strict=True):
        for index, (lr, part) in enumerate(table.groupby("optim.lr")):
            axis.scatter(part["kl_to_start"], part[name], color=f"C{index}", label=f"lr {lr:g}")
        axis.set(xlabel="KL to the start (nats a token)", ylabel=label)
    axes[0].legend()
    return [plots.save(folder, "margin", figure, shown, runs.count())]
