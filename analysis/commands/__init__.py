"""The commands of `python -m analysis`, a file for each group."""

__all__ = [
    "comparison",
    "compute_optimal",
    "law",
    "options",
    "prediction",
]
