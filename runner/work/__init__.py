"""The kinds of work of a cell: train, evaluate, make data, sample solutions, weigh a mixture,
store weights in few bits, measure a draft.

Each config is a `Work` of `runner/records/contracts.py`.
"""

__all__ = [
    "config",
    "evaluate",
    "make",
    "make_people",
    "notes",
    "outputs",
    "quantisation_cost",
    "quantise",
    "sample",
    "speculate",
    "speculate_config",
    "train",
    "weigh",
]
