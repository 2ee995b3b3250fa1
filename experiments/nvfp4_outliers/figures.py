"""The Hadamard transform on drawn outliers (drawn.py) and on operands of wgrad in training."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.runs import Runs

HERE = Path(__file__).parent
NAME = "nvfp4_outliers"


def trained(runs: Runs) -> pd.DataFrame:
    """Return the last SQNR and kurtosis of wgrad's operands, the median over layers."""
    sizes = runs.finished.set_index("fingerprint")["precision.wgrad.hadamard"]
    history = runs.history[runs.history["key"].str.contains(r"/wgrad\.[gx]/(?:sqnr_db|kurtosis)$")]
    last = history.sort_values("step").groupby(["fingerprint", "key"])["value"].last().reset_index()
    parts = last["key"].str.split("/", expand=True)
    last = last.assign(operand=parts[2], what=parts[3], hadamard=last["fingerprint"].map(sizes))
    table = last.pivot_table(
        index=["operand", "hadamard"], columns="what", values="value", aggfunc="median"
    )
    return table.reset_index()


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    drawn, operands = pd.read_csv(HERE / "drawn.csv"), trained(runs)
    parts = [drawn.assign(source="drawn"), operands.assign(source="trained")]
    both = pd.concat(parts, ignore_index=True)
    both.to_csv(folder.parent / "results.csv", index=False)
    print(both.round(2).to_string(index=False, na_rep=""))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.8))
    for size, part in drawn.groupby("hadamard"):
        left.plot(part["factor"], part["sqnr_db"], "o-", label=f"{size or 'none'}")
    left.set(
        xscale="log", xlabel="1% of a normal tensor larger by", ylabel="SQNR in dB", title="drawn"
    )
    left.legend(title="Hadamard", fontsize=6)
    names = {"wgrad.g": "gradients", "wgrad.x": "activations"}
    for operand, part in operands.groupby("operand"):
        right.plot(range(len(part)), part["sqnr_db"], "o-", label=names[operand])
        ticks = [str(int(size) or "none") for size in part["hadamard"]]
        right.set_xticks(range(len(part)), ticks)
    right.set(xlabel="Hadamard on wgrad", ylabel="SQNR in dB", title="trained, median of layers")
    right.legend()
    return [plots.save(folder, NAME, figure, both, runs.count())]
