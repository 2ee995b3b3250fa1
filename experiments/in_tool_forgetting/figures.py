"""What is forgotten against what is learnt, by heart and looked up, at the same learning rates."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAMES = {"in_weight": "by heart", "in_tool": "looked up"}
FORGOTTEN = {
    "kl_to_start": "KL to the start (nats a token)",
    "text_loss": "loss on WikiText (nats a token)",
    "hellaswag/acc_norm,none": "HellaSwag",
}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    done["kind"] = done["data.condition"].map(NAMES)
    there = [name for name in FORGOTTEN if name in done]
    columns = ["kind", "optim.lr", "seed", "recall", "recall/unseen_train", *there, "tv_to_start"]
    table = done[[name for name in columns if name in done]].sort_values(columns[:3])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, ["kind", "optim.lr"], "kl_to_start", facts=["recall", *there[1:]])
    print(shown.to_string(index=False))
    figure, axes = plt.subplots(
        1, len(there), figsize=(3.3 * len(there), 2.8), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], there, strict=True):
        for index, (kind, part) in enumerate(table.groupby("kind")):
            axis.scatter(part["recall"], part[name], color=f"C{index}", label=kind, s=14)
        axis.set(xlabel="recall", ylabel=FORGOTTEN[name])
    axes[0][0].legend()
    return [plots.save(folder, "forgetting", figure, shown, runs.count())]
