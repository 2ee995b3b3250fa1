"""The local launcher: a fork server that imported torch once and forks a fresh child per cell.

multiprocessing's forkserver is that template: it imports the preload list, then forks on request.
A child that segfaults or runs out of memory ends that cell alone.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from runner import journal
from runner.sweep.cells import Cell

_PRELOAD = ["torch", "torch._dynamo", "runner.worker", "runner.train", "models.decoder"]


@dataclass
class Pool:
    """Runs cells, `jobs` at a time; `tick` is called some times a second for the live table."""

    jobs: int
    threads: int
    gpus: list[int] = field(default_factory=list)

    def run(self, cells: list[Cell], tick: Callable[[], None]) -> None:
        """Run all cells to their end; on Ctrl-C every child saves and stops, then it is re-raised."""
        method = "spawn" if sys.platform == "darwin" else "forkserver"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(_PRELOAD)
        waiting = list(cells)
        running: dict[BaseProcess, int | None] = {}
        free_gpus = list(self.gpus)
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    gpu = free_gpus.pop(0) if free_gpus else None
                    running[self._start(context, waiting.pop(0), gpu)] = gpu
                for child in [c for c in running if not c.is_alive()]:
                    gpu = running.pop(child)
                    if gpu is not None:
                        free_gpus.append(gpu)
                    _record_crash(Path(child.name), child.exitcode)
                tick()
                time.sleep(0.02)
        except KeyboardInterrupt:
            _stop(list(running))
            raise

    def _start(self, context, cell: Cell, gpu: int | None) -> BaseProcess:  # type: ignore[no-untyped-def]
        arguments = (str(cell.folder), self.threads, gpu)
        child: BaseProcess = context.Process(target=_child, args=arguments, name=str(cell.folder))
        child.start()
        return child


def _child(folder: str, threads: int, gpu: int | None) -> None:
    """In the forked child: take the share of the machine that the launcher gave, then work."""
    os.environ["ESPALIER_LAUNCHED"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch  # noqa: PLC0415

    from runner.worker import run_cell  # noqa: PLC0415

    torch.set_num_threads(threads)
    code = run_cell(Path(folder))
    sys.stdout.flush()
    os._exit(code)


def _record_crash(folder: Path, exitcode: int | None) -> None:
    """Write `failed` for a child that could not do so itself."""
    tries = journal.attempts(folder)
    if not tries or journal.state(folder) != "interrupted":
        return
    if not any(e["event"] in journal.TERMINAL for e in journal.events(tries[-1])):
        code = exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        message = f"the process ended with {cause}"
        record = {"event": "failed", "time": time.time(), "error": "Crash", "message": message}
        journal.append_line(tries[-1] / "events.jsonl", record)


def _stop(children: list[BaseProcess]) -> None:
    for child in children:
        child.terminate()
    try:
        for child in children:
            child.join()
    except KeyboardInterrupt:
        for child in children:
            child.kill()


def count_gpus() -> list[int]:
    """Return the indices of this machine's GPUs by NVML: torch would initialise CUDA."""
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return list(range(pynvml.nvmlDeviceGetCount()))
