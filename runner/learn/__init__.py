"""Training: the loop, optimisers, tasks, memory, profiler."""

__all__ = [
    "config",
    "corpus",
    "memory",
    "optim",
    "profiler",
    "setup",
    "tasks",
    "trainer",
]
