"""Loss against bytes, one line a scheme; the differences from fp32, paired by size and seed."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

NAME = "quantised"
SCHEME, WIDTH, BYTES = "work.scheme", "model.width", "checkpoint_bytes"
FACTS = ["loss_delta", "kl", "top1_agreement", "bits_per_weight", BYTES, "quantise_s", "emulated"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    small = done[done[SCHEME].notna()]
    table = over_seeds(small, [WIDTH, SCHEME], "val_loss", facts=FACTS)
    spread = small.groupby([WIDTH, SCHEME])["loss_delta"].agg(["min", "max"]).reset_index()
    spread = spread.rename(columns={"min": "least_delta", "max": "most_delta"})
    table = table.merge(spread, on=[WIDTH, SCHEME])
    table = table.sort_values([WIDTH, BYTES], ignore_index=True)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
    for scheme, own in table.groupby(SCHEME):
        axes[0].plot(own[BYTES] / 1024, own["mean"], marker="o", ms=3, label=scheme)
        axes[1].plot(own[WIDTH], own["loss_delta"].clip(lower=1e-6), marker="o", ms=3)
    axes[0].plot(*_full(done), color="black", marker="s", ms=3, label="fp32")
    axes[0].set(xlabel="weights on disk (KiB)", ylabel=plots.AXES["val_loss"], xscale="log")
    axes[0].legend(fontsize=5, ncols=2)
    axes[1].set(xlabel="width", ylabel="loss added (nats)", yscale="log")
    return [plots.save(folder, NAME, figure, table, runs.count())]


def _full(done: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Return (KiB, loss) of the models before; four bytes a parameter."""
    full = over_seeds(done[done[SCHEME].isna()], [WIDTH], "val_loss", facts=["num_parameters"])
    return full["num_parameters"] * 4 / 1024, full["mean"]
