"""Training: the loop, optimisers, tasks, memory, profiler."""

__all__ = [
    "config",
    "memory",
    "optim",
    "profiler",
    "setup",
    "tasks",
    "trainer",
]
