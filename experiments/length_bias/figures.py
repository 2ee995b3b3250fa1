"""The length of answers, the share cut off and the reward along training, by the loss of GRPO.

A row for each start. Lines are means over seeds, bands go from the least to the greatest.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

SHOWN = {"answer_tokens": "tokens of an answer", "cut": "share cut off", "reward": "reward"}
STARTS = {"rl": "after 400 steps on solutions", "rl_longer": "after 800 steps"}
STYLES = ("-", "--", ":")
LAST = ["val_answer_tokens", "val_reward", "val_cut"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    done = done[done["stage"].isin(STARTS)]
    keys = ["stage", "task.loss", "seed"]
    last = [key for key in LAST if key in done]
    table = done[[*keys, *last]].sort_values(keys)
    table.to_csv(folder.parent / "results.csv", index=False)
    shown = over_seeds(table, keys[:2], last[0], facts=last[1:])
    print(shown.to_string(index=False))
    starts = [stage for stage in STARTS if stage in set(done["stage"])]
    figure, axes = plt.subplots(
        len(starts),
        len(SHOWN),
        figsize=(9.6, 2.6 * len(starts)),
        layout="constrained",
        squeeze=False,
    )
    for row, stage in zip(axes, starts, strict=True):
        losses = done[done["stage"] == stage].set_index("fingerprint")["task.loss"]
        for axis, (key, label) in zip(row, SHOWN.items(), strict=True):
            _draw(axis, runs, losses, key)
            axis.set(ylabel=label, xlabel="step" if stage == starts[-1] else "")
        row[0].set(title=STARTS[stage])
        for axis in row[1:]:
            axis.set(ylim=(-0.02, 1.02))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return [plots.save(folder, "length", figure, shown, runs.count())]


def _draw(axis: Axes, runs: Runs, losses: pd.Series, key: str) -> None:
    curves = runs.curves(key, "step")
    curves = curves[curves["fingerprint"].isin(losses.index)]
    curves["loss"] = curves["fingerprint"].map(losses)
    for index, (loss, part) in enumerate(curves.groupby("loss")):
        seeds = part.groupby("x")["value"].agg(["mean", "min", "max"])
        axis.plot(seeds.index, seeds["mean"], f"C{index}", ls=STYLES[index], label=loss)
        axis.fill_between(seeds.index, seeds["min"], seeds["max"], color=f"C{index}", alpha=0.15)
