"""The local launcher: a fork server that imported torch once and forks a fresh child per cell.

multiprocessing's forkserver is that template: it imports the preload list, then forks on request.
A child that segfaults or runs out of memory ends that cell alone.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

from runner import journal
from runner.feed import FED
from runner.sweep.cells import Cell

_TICK_S = 0.25
CANCEL = "cancel"  # a file of this name in a run folder: do not start this cell
_PRELOAD = ["runner.sweep.template"]


def warm_up() -> None:
    """Start the template now: it imports torch while the caller composes the cells."""
    if sys.platform != "darwin":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()


@dataclass
class Pool:
    """Runs cells, `jobs` at a time; `tick` is called some times a second for the live table."""

    jobs: int
    threads: int
    gpus: list[int] = field(default_factory=list)

    def run(self, cells: list[Cell], elsewhere: list[Cell], tick: Callable[[], None]) -> None:
        """Run `cells` to their end and wait for those `elsewhere`, taking over what is left there.

        On Ctrl-C every child saves and stops, then it is re-raised.
        """
        warm_up()
        waiting, watched = list(cells), list(elsewhere)
        running: dict[BaseProcess, tuple[Cell, list[int]]] = {}
        free = list(self.gpus)
        try:
            while waiting or running or watched:
                waiting = [cell for cell in waiting if not (cell.folder / CANCEL).exists()]
                while waiting and len(running) < self.jobs:
                    count = gpus_for(waiting[0], self.gpus)
                    if count > len(free):
                        break
                    mine, free = free[:count], free[count:]
                    cell = waiting.pop(0)
                    running[self._start(cell, mine)] = (cell, mine)
                tick()
                connection.wait([child.sentinel for child in running], timeout=_TICK_S)
                for child in [c for c in running if not c.is_alive()]:
                    cell, gpus = running.pop(child)
                    free += gpus
                    if child.exitcode == journal.HELD:
                        watched.append(cell)
                    _record_crash(cell.folder, child.exitcode)
                if watched and not running:
                    time.sleep(_TICK_S)
                states = {cell.fingerprint: cell.state for cell in watched}
                waiting += [c for c in watched if states[c.fingerprint] in ("new", "interrupted")]
                watched = [c for c in watched if states[c.fingerprint] == "running"]
        except KeyboardInterrupt:
            _stop(list(running))
            raise

    def _start(self, cell: Cell, gpus: list[int]) -> BaseProcess:
        arguments = (str(cell.folder), self.threads, gpus, cell.config.resources.num_processes)
        process = SpawnProcess if sys.platform == "darwin" else ForkServerProcess
        child: BaseProcess = process(target=_child, args=arguments)
        child.start()
        return child


def gpus_for(cell: Cell, present: list[int]) -> int:
    """Return how many GPUs `cell` gets on a machine that has `present`."""
    asked: int | None = cell.config.resources.gpus
    return min(1, len(present)) if asked is None else asked


def cancel_cell(cell: Cell, task: str | None) -> str:
    """Keep `cell` from starting, or ask its holder to save and stop; say what was done.

    `task` is its SLURM array task, if it has one.
    """
    state = cell.state
    if state not in ("new", "interrupted", "running"):
        return f"{state}, left as it is"
    (cell.folder / CANCEL).touch()
    if task is not None:
        done = subprocess.run(["scancel", task], capture_output=True, text=True, check=False)
        return f"scancel {task}: {done.stderr.strip() or 'sent'}"
    if state != "running":
        return "will not start"
    lease = json.loads((journal.attempts(cell.folder)[-1] / "lease.json").read_text())
    if lease["host"] != socket.gethostname():
        return f"runs on {lease['host']}; cancel it there"
    os.kill(lease["pid"], signal.SIGTERM)
    return "asked to save and stop"


def worker_command(folder: Path, processes: int) -> list[str]:
    """Return the command that trains a cell in several processes of this machine."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, "-m", "runner.worker", str(folder)]


def _child(folder: str, threads: int, gpus: list[int], processes: int) -> None:
    """In the forked child: take the share of the machine that the launcher gave, then work."""
    os.environ["ESPALIER_LAUNCHED"] = os.environ[FED] = "1"
    threads = max(1, threads // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        command = worker_command(Path(folder), processes)
        os.execv(command[0], command)
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
