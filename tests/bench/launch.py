"""Overhead per trivial job that imports torch: our fork server beside joblib and submitit_local.

    python tests/bench/launch.py [jobs]      one run, one machine, two at a time

The job imports torch and returns. submitit_local starts a fresh interpreter per job, all at once.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable


def job() -> None:
    """What every peer runs."""
    import torch

    assert torch.__version__


def ours(count: int) -> None:
    """The mechanism of runner/sweep/pool.py: a preloaded fork server, a fresh child per job."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    running: list[multiprocessing.process.BaseProcess] = []
    for _ in range(count):
        while len(running) >= 2:
            running = [child for child in running if child.is_alive()]
            time.sleep(0.001)
        running.append(context.Process(target=job))
        running[-1].start()
    for child in running:
        child.join()


def with_joblib(count: int) -> None:
    """joblib's loky, n_jobs=2: workers are reused, so torch is imported twice in all."""
    import joblib

    joblib.Parallel(n_jobs=2)(joblib.delayed(job)() for _ in range(count))


def with_submitit(count: int) -> None:
    """submitit's local executor."""
    import submitit

    executor = submitit.LocalExecutor(tempfile.mkdtemp())
    for handle in [executor.submit(job) for _ in range(count)]:
        handle.result()


def main(count: int) -> None:
    """Time each once and print the table."""
    peers: dict[str, Callable[[int], None]] = {
        "fork server (ours)": ours,
        "joblib n_jobs=2": with_joblib,
        "submitit_local": with_submitit,
    }
    seconds = {}
    for name, run in peers.items():
        start = time.perf_counter()
        run(count)
        seconds[name] = (time.perf_counter() - start) / count
    base = seconds["fork server (ours)"]
    for name, value in seconds.items():
        print(f"{name:20s} {value * 1000:8.1f} ms/job   {value / base:6.1f}x ours")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
