"""Held-out loss, BLiMP and LAMBADA against size, with standard errors, beside the n-gram."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.runs import Runs

HERE = Path(__file__).parent
PANELS = {  # metric: (label, its name in ngram.json)
    "val_bits_per_byte": ("held-out novels (bits/byte)", "val_bits_per_byte"),
    "blimp/acc": ("BLiMP (accuracy)", "blimp/acc"),
    "lambada/perplexity": ("LAMBADA (perplexity of the word)", "lambada/perplexity"),
}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    baseline = json.loads((HERE / "ngram.json").read_text())
    counted = {row["name"]: row for row in baseline["scores"]}
    done = runs.finished.sort_values(["num_parameters", "seed"])
    metrics = [*PANELS, "lambada/acc"]
    rows = [
        {"model": f"{plots.short(run['num_parameters'])} parameters", "seed": run["seed"]}
        | {f"{m}{part}": run.get(f"{m}{part}") for m in metrics for part in ("", "_stderr")}
        for _, run in done.iterrows()
    ]
    ngram = {
        "model": f"{baseline['order']}-gram",
        "val_bits_per_byte": baseline["val_bits_per_byte"],
    }
    for name, row in counted.items():
        ngram |= {name: row["value"], f"{name}_stderr": row["stderr"]}
    table = pd.DataFrame([ngram, *rows]).dropna(axis="columns", how="all")
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 2.8), layout="constrained")
    for axis, (metric, (label, name)) in zip(axes, PANELS.items(), strict=True):
        error = done.get(f"{metric}_stderr")
        axis.errorbar(
            done["num_parameters"],
            done[metric],
            error,
            fmt="o",
            capsize=2,
            label="decoder, each seed",
        )
        axis.plot(done.groupby("num_parameters")[metric].mean(), color="C0", linewidth=0.8)
        value = baseline[name] if name in baseline else counted[name]["value"]
        axis.axhline(value, color="0.4", linestyle="--", label=f"{baseline['order']}-gram")
        axis.set(xscale="log", xlabel="parameters", ylabel=label)
        sizes = done["num_parameters"].unique()
        axis.set_xticks(sizes, labels=[plots.short(size) for size in sizes])
        axis.minorticks_off()
        if "perplexity" in metric:
            axis.set_yscale("log")
    axes[1].axhline(0.5, color="0.7", linewidth=0.8)
    axes[0].legend()
    return [plots.save(folder, "scores", figure, table, runs.count())]
