"""The kinds of work of a cell: train, evaluate, make data, sample solutions, weigh a mixture.

Each config is a `Work` of `runner/records/contracts.py`.
"""

__all__ = [
    "config",
    "evaluate",
    "make",
    "make_people",
    "notes",
    "outputs",
    "sample",
    "train",
    "weigh",
]
