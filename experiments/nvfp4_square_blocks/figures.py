"""Weights in square blocks in fprop, in dgrad, in neither: beside the recipe, paired by seed."""

from pathlib import Path

import pandas as pd

from analysis.ablation import ablate
from analysis.runs import Runs

NAME = "nvfp4_square_blocks"
SQUARE = ("precision.fprop.w.block", "precision.dgrad.w.block")


def _choice(row: "pd.Series[object]") -> str:
    fprop, dgrad = (row[key] == "16x16" for key in SQUARE)
    return {
        (True, True): "both square",
        (True, False): "square in fprop",
        (False, True): "square in dgrad",
    }.get((fprop, dgrad), "both 1x16")


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return ablate(
        runs,
        choice=_choice,
        baseline="both square",
        pair=["seed"],
        folder=folder,
        name=NAME,
        title="Blocks of weights beside the recipe",
    )
