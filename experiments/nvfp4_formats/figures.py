"""What each format costs beside bf16, paired by seed."""

import sys
from pathlib import Path

from analysis.ablation import ablate, first_word
from analysis.runs import Runs, from_folders

HERE = Path(__file__).parent
NAME = "nvfp4_formats"


def main(runs: Runs, folder: Path = HERE / "figures") -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return ablate(
        runs,
        choice=first_word,
        baseline="bf16",
        pair=["seed"],
        folder=folder,
        name=NAME,
        title="Each format beside bf16",
    )


if __name__ == "__main__":
    for path in main(from_folders(Path(sys.argv[1] if len(sys.argv) > 1 else "."), NAME)):
        print(path)
