"""The length of answers, the share cut off and the reward along training, by the loss of GRPO.

Lines are means over seeds, bands go from the least to the greatest.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

SHOWN = {"answer_tokens": "tokens of an answer", "cut": "share cut off", "reward": "reward"}
STYLES = ("-", "--", ":")
LAST = ["val_answer_tokens", "val_reward"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    done = done[done["stage"] == "rl"]
    table = done[["task.loss", "seed", *LAST]].sort_values(["task.loss", "seed"])
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, ["task.loss"], LAST[0], facts=LAST[1:])
    print(shown.to_string(index=False))
    losses = done.set_index("fingerprint")["task.loss"]
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(9.6, 2.8), layout="constrained")
    for axis, (key, label) in zip(axes, SHOWN.items(), strict=True):
        curves = runs.curves(key, "step")
        curves = curves[curves["fingerprint"].isin(losses.index)]
        curves["loss"] = curves["fingerprint"].map(losses)
        for index, (loss, part) in enumerate(curves.groupby("loss")):
            seeds = part.groupby("x")["value"].agg(["mean", "min", "max"])
            axis.plot(seeds.index, seeds["mean"], f"C{index}", ls=STYLES[index], label=loss)
            axis.fill_between(
                seeds.index, seeds["min"], seeds["max"], color=f"C{index}", alpha=0.15
            )
        axis.set(xlabel="step", ylabel=label)
    for axis in axes[1:]:
        axis.set(ylim=(-0.02, 1.02))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return [plots.save(folder, "length", figure, shown, runs.count())]
