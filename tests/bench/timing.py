"""Calls timed in turns, so that a noisy moment of the machine strikes all of them."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, float]:
    """Return the least seconds of each call over the rounds; a first round warms up.

    A call ends when the GPU has done what it was given, where there is one.

    Args:
        clock: `time.process_time` on a machine that does other work too, with one thread.
    """
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            _finish()
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def best_ms(call: Callable[[], object], rounds: int = 15) -> float:
    """Return the least time of a call in ms, see `interleaved`."""
    return 1e3 * interleaved({"": call}, rounds)[""]


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
