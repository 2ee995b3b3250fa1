"""Stochastic rounding by operand, beside rounding to nearest, paired by seed."""

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.ablation import ablate
from analysis.runs import Runs

NAME = "nvfp4_stochastic"
OPERANDS = {"gradients": "dgrad.g", "activations": "fprop.x", "weights": "fprop.w"}


def choice(row: "pd.Series[Any]") -> str:
    """Return the operands that are rounded stochastically."""
    rounding = {name: row[f"precision.{key}.rounding"] for name, key in OPERANDS.items()}
    stochastic = [name for name, kind in rounding.items() if kind == "stochastic"]
    names = {0: "nearest", len(OPERANDS): "all three"}
    return names.get(len(stochastic), ", ".join(stochastic))


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return ablate(
        runs,
        choice=choice,
        baseline="nearest",
        pair=["seed"],
        folder=folder,
        name=NAME,
        title="Stochastic rounding of ...",
    )
