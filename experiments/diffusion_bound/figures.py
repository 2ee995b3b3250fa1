"""Loss of next tokens and bound of masked diffusion by FLOPs, and the distance between the two."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from analysis import plots
from analysis.paired import reached
from analysis.runs import Runs


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    loss = runs.curves("val_loss", "flops")
    bound = runs.curves("val_bound", "flops")
    table = pd.DataFrame(
        [_distance(done, loss, width) for width in sorted(done["model.width"].unique())]
    )
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axis = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for curves, name, style in (
        (loss, "next tokens: loss", "-"),
        (bound, "diffusion: bound", "--"),
    ):
        for number, (_, part) in enumerate(curves.groupby("fingerprint")):
            part = part.sort_values("x")
            colour = "C0" if style == "-" else "C1"
            label = name if number == 0 else None
            axis.plot(part["x"], part["value"], style, color=colour, alpha=0.6, label=label)
    axis.set(xscale="log", xlabel="training FLOPs", ylabel="nats per byte")
    axis.legend()
    return [plots.save(folder, "loss_and_bound", figure, table, runs.count())]


def _distance(done: pd.DataFrame, loss: pd.DataFrame, width: int) -> dict[str, float]:
    """Return, of one size, how many times the FLOPs the bound needs for the number that it reaches.

    Paired by seed: the FLOPs at which next-token prediction of the same size is at the bound's last
    value. Where it is there at its first validation, the ratio is a lower limit (`at_least`).
    """
    ours = done[done["model.width"] == width]
    ratios, at_least = [], 0
    for _, pair in ours.groupby("seed"):
        causal = pair[pair["task"] == "language_modelling"]["fingerprint"]
        other = pair[pair["task"] == "diffusion"]
        if causal.empty or other.empty or other["val_bound"].isna().any():
            continue
        curve = loss[loss["fingerprint"] == causal.iloc[0]]
        there = float(reached(curve, float(other["val_bound"].iloc[0])).iloc[0])
        at_least += int(there <= curve["x"].min())
        ratios.append(float(other["flops"].iloc[0]) / there)
    logs = np.log(ratios)
    n = len(logs)
    spread = stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return {
        "width": width,
        "val_loss": ours["val_loss"].mean(),
        "val_bound": ours["val_bound"].mean(),
        "times_the_flops": float(np.exp(logs.mean())) if n else np.nan,
        "low": float(np.exp(logs.mean() - spread)) if n else np.nan,
        "high": float(np.exp(logs.mean() + spread)) if n else np.nan,
        "at_least": at_least,
        "n": n,
    }
