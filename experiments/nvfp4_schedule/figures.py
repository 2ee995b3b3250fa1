"""Main effects of a quantile scale, stochastic gradients and a bf16 cool-down."""

import sys
from pathlib import Path

from analysis.ablation import effects
from analysis.runs import Runs, from_folders

HERE = Path(__file__).parent
NAME = "nvfp4_schedule"
FACTORS = {
    "stochastic gradients": ("precision.dgrad.g.rounding", "nearest", "stochastic"),
    "scale of the 99.99% quantile": ("precision.dgrad.g.quantile", 1.0, 0.9999),
    "last 18% in bf16": ("precision.switch_at", 1.0, 0.82),
}


def main(runs: Runs, folder: Path = HERE / "figures") -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return effects(runs, factors=FACTORS, folder=folder, name=NAME, title="Each part on minus off")


if __name__ == "__main__":
    for path in main(from_folders(Path(sys.argv[1] if len(sys.argv) > 1 else "."), NAME)):
        print(path)
