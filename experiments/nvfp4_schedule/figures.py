"""Main effects of a quantile scale, stochastic gradients and a bf16 cool-down."""

from pathlib import Path

from analysis.ablation import effects
from analysis.runs import Runs

NAME = "nvfp4_schedule"
FACTORS = {
    "stochastic gradients": ("precision.dgrad.g.rounding", "nearest", "stochastic"),
    "scale of the 99.99% quantile": ("precision.dgrad.g.quantile", 1.0, 0.9999),
    "last 18% in bf16": ("precision.switch_at", 1.0, 0.82),
}


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    return effects(runs, factors=FACTORS, folder=folder, name=NAME, title="Each part on minus off")
