"""Accuracy of recall against width and bytes of state, at the better learning rate."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.runs import Runs

NAME = "mqar"
NAMES = {"a": "attention", "b": "Based", "d": "gated DeltaNet", "l": "gated long convolution"}
BY = ["train.sequence_length", "data.num_pairs", "mixer", "model.width"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished.copy()
    done["mixer"] = done["model.pattern"].map(NAMES)
    table = done[
        [*BY, "optim.lr", "val_accuracy", "val_loss", "state_bytes", "num_parameters"]
    ].sort_values([*BY, "optim.lr"])
    table.to_csv(folder.parent / "results.csv", index=False)
    best = table.loc[table.groupby(BY)["val_accuracy"].idxmax()]
    print(best.to_string(index=False))
    lengths = list(best.groupby(["train.sequence_length", "data.num_pairs"]))
    figure, axes = plt.subplots(
        1,
        len(lengths) + 1,
        figsize=(3.3 * (len(lengths) + 1), 2.9),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, ((length, pairs), part) in zip(axes[0], lengths, strict=False):
        for index, mixer in enumerate(NAMES.values()):
            curve = part[part["mixer"] == mixer]
            axis.plot(
                curve["model.width"], curve["val_accuracy"], marker="os^v"[index], label=mixer
            )
        axis.set(xscale="log", xlabel="width", title=f"{length} tokens, {pairs} pairs")
        widths = sorted(part["model.width"].unique())
        axis.set_xticks(widths, labels=[str(width) for width in widths])
        axis.minorticks_off()
    axes[0][0].set(ylabel="accuracy of recall", ylim=(-0.03, 1.03))
    axes[0][0].legend()
    last = axes[0][-1]
    for index, mixer in enumerate(NAMES.values()):
        curve = best[best["mixer"] == mixer]
        kib, accuracy = curve["state_bytes"] / 1024, curve["val_accuracy"]
        last.plot(kib, accuracy, marker="os^v"[index], label=mixer)
    last.set(xscale="log", xlabel="state of a sequence (KiB)")
    least, most = best["state_bytes"].min() / 1024, best["state_bytes"].max() / 1024
    sizes = [2**n for n in range(20) if least / 2 < 2**n < 2 * most]
    last.set_xticks(sizes, labels=[str(size) for size in sizes])
    last.minorticks_off()
    return [plots.save(folder, NAME, figure, best, runs.count())]
