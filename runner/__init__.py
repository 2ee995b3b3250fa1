"""What a run does: sweep (points, cells, plan, launch), data, training, checkpoints, tracking."""

__all__ = [
    "commands",
    "data",
    "evaluate",
    "exchange",
    "generate",
    "grid",
    "launch",
    "learn",
    "machine",
    "records",
    "views",
    "work",
]
