"""Training: the loop, optimisers, tasks, memory, profiler."""
