"""The commands of `python -m analysis`, a file for each group."""

__all__ = [
    "chain",
    "comparison",
    "compute_optimal",
    "law",
    "options",
    "prediction",
]
