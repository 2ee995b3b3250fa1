"""The main effect of each part of the NVFP4 recipe over a full factorial grid."""

from pathlib import Path

from analysis.ablation import effects
from analysis.runs import Runs

NAME = "nvfp4_ablation"
FACTORS = {
    "stochastic gradients": ("precision.dgrad.g.rounding", "nearest", "stochastic"),
    "Hadamard on wgrad": ("precision.wgrad.hadamard", 0, 16),
    "weights 16x16": ("precision.fprop.w.block", "1x16", "16x16"),
    "last block in bf16": ("precision.keep_last", 0.0, 0.25),
}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return effects(runs, factors=FACTORS, folder=folder, name=NAME, title="Each part on minus off")
