"""GSM8K solved greedily, and what is wrong with the rest, by prompt, LoRA and calculator."""

from pathlib import Path

import matplotlib.pyplot as plt

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

KINDS = {
    "greedy": "right",
    "wrong_arithmetic": "wrong arithmetic",
    "wrong_reasoning": "wrong reasoning",
    "unparsed": "unparsed",
}
STAGES = ["prompt", "few_shot", "lora", "calculator"]


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figure."""
    done = runs.finished
    facts = [f"gsm8k/{kind}" for kind in KINDS if kind != "greedy"]
    facts += ["gsm8k/greedy_stderr", "gsm8k/pass_at_4"]
    table = over_seeds(done, ["stage"], "gsm8k/greedy", facts=facts)
    table = table.sort_values("stage", key=lambda names: names.map(STAGES.index))
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False))
    figure, axis = plt.subplots(figsize=(5.6, 0.8 + 0.4 * len(table)), layout="constrained")
    left = 0.0 * table["mean"]
    for kind, label in KINDS.items():
        values = table["mean"] if kind == "greedy" else table[f"gsm8k/{kind}"]
        axis.barh(table["stage"], values, left=left, label=label)
        left = left + values
    axis.set(xlabel="share of problems", xlim=(0, 1))
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=4, fontsize=7)
    return [plots.save(folder, "solved", figure, table, runs.count())]
