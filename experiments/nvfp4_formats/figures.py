"""What each format costs beside bf16, paired by seed."""

from pathlib import Path

from analysis.ablation import ablate
from analysis.runs import Runs

NAME = "nvfp4_formats"


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return ablate(
        runs,
        choice=lambda row: str(row["precision"]),
        baseline="bf16",
        pair=["seed"],
        folder=folder,
        name=NAME,
        title="Each format beside bf16",
    )
