"""The toy beside its entropy; loss by size of the tables and by share of experts; gates."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import plots
from analysis.internals import gate_map
from analysis.paired import over_seeds
from analysis.runs import Runs

HERE = Path(__file__).parent
NAME = "engram"
TOY = {"f": "feed-forward", "nf": "memory", "af": "attention", "naf": "memory and attention"}
MOST_EXPERTS, TOP_K = 14, 2


def parts(runs: Runs) -> dict[str, pd.DataFrame]:
    """Return for each of the three parts of the grid its means over seeds."""
    done = runs.finished.copy()
    pattern = done["model.pattern"].fillna("af")
    toy, rows, split = (
        done[pattern.isin(names)].copy() for names in (TOY, ["naf af af"], ["nae ae ae"])
    )
    toy["mixer"] = toy["model.pattern"].fillna("af").map(TOY)
    split["share"] = (split["model.parts.e.num_experts"] - TOP_K) / (MOST_EXPERTS - TOP_K)
    return {
        "toy": over_seeds(toy, ["mixer"], "val_loss"),
        "rows": over_seeds(rows, ["model.parts.n.table_size", "num_parameters"], "val_loss"),
        "split": over_seeds(
            split, ["share", "num_parameters", "num_active_parameters"], "val_loss"
        ),
    }


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write figures and results.csv; return the figures."""
    means = parts(runs)
    least = float(pd.read_csv(HERE / "entropy.csv")["entropy_nats"].iloc[0])
    table = pd.concat([part.assign(part=name) for name, part in means.items()], ignore_index=True)
    table.to_csv(folder.parent / "results.csv", index=False)
    print(table.to_string(index=False), f"entropy of the toy: {least:.4f}", sep="\n")
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    toy = means["toy"].set_index("mixer").loc[list(TOY.values())]
    axes[0].bar(range(len(toy)), toy["mean"], yerr=toy["std"], capsize=2, width=0.6)
    axes[0].axhline(least, color="#D55E00", linestyle="--", label=f"entropy {least:.2f}")
    axes[0].set_xticks(range(len(toy)), [name.replace(" and ", "\nand ") for name in toy.index])
    axes[0].set(title="tri-grams of 32 symbols")
    axes[0].legend()
    for axis, name, x in (
        (axes[1], "rows", "model.parts.n.table_size"),
        (axes[2], "split", "share"),
    ):
        part = means[name]
        label = f"n={int(part['n'].min())}"
        axis.errorbar(part[x], part["mean"], part["std"], marker="o", capsize=2, label=label)
        axis.legend()
    axes[1].set(xscale="log", xlabel="rows of a table", title="size of the memory")
    axes[2].set(xlabel="share of idle parameters in experts", title="experts or memory")
    for axis in axes:
        axis.set_ylabel(plots.AXES["val_loss"])
    made = [plots.save(folder, NAME, figure, table, runs.count())]
    gates = pd.read_csv(HERE / "gates.csv", keep_default_na=False)
    return [*made, plots.save(folder, "gates", gate_map(gates), gates)]
