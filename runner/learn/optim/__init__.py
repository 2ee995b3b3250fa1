"""Optimisers, their parameter groups, learning-rate schedules and weight averages."""

__all__ = [
    "average",
    "average_config",
    "build",
    "groups",
    "groups_config",
    "muon",
    "schedule",
]
