"""GSM8K solved greedily, and what is wrong with the rest, by prompt, LoRA and calculator."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

KINDS = ("greedy", "wrong_arithmetic", "wrong_reasoning", "unparsed")


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    facts = [f"gsm8k/{kind}" for kind in (*KINDS[1:], "greedy_stderr")]
    table = over_seeds(done, ["stage"], "gsm8k/greedy", facts=facts)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axis = plt.subplots(figsize=(5.6, 0.8 + 0.4 * len(table)), layout="constrained")
    left = 0.0 * table["mean"]
    for kind in KINDS:
        values = table["mean"] if kind == "greedy" else table[f"gsm8k/{kind}"]
        axis.barh(table["stage"], values, left=left, label=kind.replace("_", " "))
        left = left + values
    axis.set(xlabel="share of problems", xlim=(0, 1))
    figure.legend(loc="outside upper center", ncols=4, fontsize=7)
    return [plots.save(folder, "solved", figure, table, runs.count())]
