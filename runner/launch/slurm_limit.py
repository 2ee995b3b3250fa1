"""How many tasks of each job array may run at once, so that a sweep keeps to its limit.

SLURM limits the running tasks of one array only. The limits of arrays that run beside each other
add up to that of the sweep; further arrays wait for the end of those before them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Array:
    """The shape of a job array.

    Args:
        tasks: their number.
        at_once: the most of them that run at the same time.
        after: ids of the jobs that must have ended before it starts.
    """

    tasks: int
    at_once: int
    after: tuple[str, ...] = ()


class Chain:
    """Arrays that together run at most `at_once` tasks at a time.

    Args:
        tasks: the number of tasks of all its arrays; if that is not above `at_once`, none waits.
        after: ids of the jobs that must have ended before its first array starts.
    """

    def __init__(self, tasks: int, at_once: int, after: Sequence[str]) -> None:
        self.tasks, self.at_once, self._after = tasks, at_once, tuple(after)

    def array(self, tasks: int, inputs: Sequence[str]) -> Array:
        """Return the shape of its next array, which also waits for the jobs `inputs`."""
        after = tuple(sorted({*self._after, *inputs}))
        return Array(tasks, min(tasks, self.at_once), after)

    def add(self, job: str) -> None:
        """Take note of a submitted array."""
        if self.tasks > self.at_once:
            self._after = (job,)


def chains(sizes: Sequence[int], limit: int, live: Mapping[str, int]) -> list[Chain]:
    """Return a chain for each group of `sizes[i]` tasks; groups above the limit share chains.

    They run beside `live` where most of the limit is free for them, else after it.

    Args:
        sizes: tasks of each group of cells, at least 1.
        limit: the most tasks of all chains and of `live` that run at the same time.
        live: the tasks that may run at the same time of each array that has not ended, by job id.
    """
    free, after = limit - sum(live.values()), list[str]()
    if free < min(sum(sizes), limit // 2 + 1):  # they would run by ones long after `live` has ended
        free, after = limit, list(live)
    count = min(len(sizes), free)
    tasks = [sum(sizes[i::count]) for i in range(count)]
    made = [Chain(t, s, after) for t, s in zip(tasks, _shares(tasks, free), strict=True)]
    return [made[i % count] for i in range(len(sizes))]


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Divide `limit` in proportion to `sizes`: at least 1 each, none above its size."""
    shares = [1] * len(sizes)
    for _ in range(min(limit, sum(sizes)) - len(sizes)):
        most = max(range(len(sizes)), key=lambda i: sizes[i] / shares[i])
        shares[most] += 1
    return shares
