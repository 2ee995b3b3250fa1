"""The Hadamard transform by GEMM and by size of its groups, beside none, paired by seed."""

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.ablation import ablate
from analysis.runs import Runs

NAME = "nvfp4_hadamard"


def choice(row: "pd.Series[Any]") -> str:
    """Return the GEMMs that are transformed, with the size."""
    sizes = {gemm: int(row[f"precision.{gemm}.hadamard"]) for gemm in ("fprop", "dgrad", "wgrad")}
    used = {gemm: size for gemm, size in sizes.items() if size}
    if len(used) == len(sizes):
        return "all three"
    return " + ".join(f"{gemm} {size}" for gemm, size in used.items()) or "none"


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return ablate(
        runs,
        choice=choice,
        baseline="none",
        pair=["seed"],
        folder=folder,
        name=NAME,
        title="Hadamard transform in ...",
    )
