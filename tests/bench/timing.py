"""Calls timed in turns, so that a noisy moment of the machine strikes all of them."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")


def interleaved(calls: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Return the least seconds of each call over the rounds; a first round warms up."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best
