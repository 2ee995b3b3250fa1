"""Runs cells on this machine: a fork server imported torch once and forks a fresh child per cell.

multiprocessing's forkserver is that template: it imports the preload list, then forks on request.
A child that segfaults or runs out of memory ends that cell alone. A SLURM job is such a pool too.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, util
from multiprocessing.context import ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from runner.launch import policy
from runner.launch.after_exit import record_crash, try_smaller
from runner.launch.fork_server import FOR_CELLS, warm_up
from runner.launch.mlflow_process import FED
from runner.machine.errors import DataError
from runner.records import journal
from runner.records.cells import Cell
from runner.records.metrics import latest

if TYPE_CHECKING:
    from runner.grid.resources import ResourcesConfig  # torch: seconds

_TICK_S, _LOOK_S = 0.25, 5.0
_STARTS = 3  # tries to start a child whose template was killed


class Source(Protocol):
    """Gives out cells one by one, as places become free."""

    def next_cell(self) -> Cell | None:
        """Return a cell to run, None once there is none."""

    def tell(self, cell: Cell) -> bool:
        """Take note of a cell that was run."""

    def look(self, cell: Cell) -> bool:
        """Look at a running cell; True where it is to be stopped."""


@dataclass
class _Child:
    """A cell's process, and what shows that it gets on."""

    cell: Cell
    gpus: list[int]
    progress: Any = None
    since: float = field(default_factory=time.monotonic)
    hung: str | None = None


@dataclass
class Pool:
    """Runs cells, `jobs` at a time.

    Args:
        threads: cores of one place.
        gpus: indices dealt out to the cells; None leaves them all that the environment shows.
        source: where further cells come from; `given` are those of it that were run.
    """

    jobs: int
    threads: int
    gpus: list[int] | None = field(default_factory=list)
    source: Source | None = None
    given: list[Cell] = field(default_factory=list)
    stopping: bool = False

    def run(self, cells: list[Cell], elsewhere: list[Cell], tick: Callable[[], None]) -> None:
        """Run `cells` to their end and wait for those `elsewhere`, taking over what is left there.

        `tick` is called some times a second. After `stop` every child saves before this returns.
        """
        warm_up()
        self._waiting, self._watched = list(cells), list(elsewhere)
        self._running: dict[BaseProcess, _Child] = {}
        self._free, self._looked = list(self.gpus or []), time.monotonic()
        self._more = self.source is not None
        while self._running or (
            not self.stopping and (self._waiting or self._watched or self._more)
        ):
            if not self.stopping:
                self._fill()
            tick()
            if self._running:
                connection.wait([child.sentinel for child in self._running], timeout=_TICK_S)
            else:
                time.sleep(_TICK_S)
            for process in [p for p in self._running if not p.is_alive()]:
                self._reap(process)
            if time.monotonic() - self._looked >= _LOOK_S:
                self._looked = time.monotonic()
                self._look()
            states = {cell.fingerprint: cell.state for cell in self._watched}
            self._waiting += [
                c for c in self._watched if states[c.fingerprint] in ("new", "interrupted")
            ]
            self._watched = [c for c in self._watched if states[c.fingerprint] == "running"]
        tick()

    def stop(self) -> None:
        """Ask every child to save and end; asked a second time, end them at once."""
        for process in list(getattr(self, "_running", ())):
            process.kill() if self.stopping else process.terminate()
        self.stopping = True

    def _fill(self) -> None:
        self._waiting = [cell for cell in self._waiting if not cell.cancelled.exists()]
        while len(self._running) < self.jobs:
            if not self._waiting and self.source is not None and self._more:
                fresh = self.source.next_cell()
                self._more = fresh is not None
                self._waiting += [fresh] if fresh is not None else []
            if not self._waiting:
                return
            if policy.halted(self._waiting[0]):
                self._waiting.clear()
                self._more = False
                return
            cell = next((c for c in self._waiting if _may_start(c)), None)
            if cell is None:
                self._drop_orphans()
                return
            count = 0 if self.gpus is None else gpus_for(cell, self.gpus)
            if count > len(self._free):
                return
            mine, self._free = self._free[:count], self._free[count:]
            self._waiting.remove(cell)
            self._running[self._start(cell, mine)] = _Child(cell, mine)

    def _drop_orphans(self) -> None:
        """Let go of cells that wait for a run which will not end here."""
        running = [child.cell for child in self._running.values()]
        coming = {c.fingerprint for c in (*self._waiting, *self._watched, *running)}
        self._waiting = [c for c in self._waiting if coming.issuperset(c.waits_for())]

    def _start(self, cell: Cell, gpus: list[int]) -> BaseProcess:
        arguments = (str(cell.folder), self.threads, gpus, cell.config.resources)
        kind = SpawnProcess if sys.platform == "darwin" else ForkServerProcess
        for last in range(_STARTS, 0, -1):
            child: BaseProcess = kind(target=_child, args=arguments)
            try:
                child.start()
                break
            except (EOFError, OSError):
                if last == 1:
                    raise
                warm_up()
        return child

    def _reap(self, process: BaseProcess) -> None:
        child = self._running.pop(process)
        self._free += child.gpus
        if process.exitcode == journal.HELD:
            self._watched.append(child.cell)
            return
        record_crash(child.cell, process.exitcode or 0, child.hung)
        smaller = try_smaller(child.cell)
        if smaller is not None:
            self._waiting.insert(0, smaller)
        elif child.cell.state == "failed":
            policy.note_failure(child.cell)
        if self.source is not None:
            self.source.tell(child.cell)
            self.given.append(child.cell)

    def _look(self) -> None:
        """Repeat a stop that came before the child could hear it, and end children that hang."""
        for process, child in self._running.items():
            if self.stopping or (self.source is not None and self.source.look(child.cell)):
                process.terminate()
            limit = child.cell.config.resources.hang_min
            now = _progress(process, child.cell)
            if now != child.progress:
                child.progress, child.since = now, time.monotonic()
            elif limit is not None and time.monotonic() - child.since > limit * 60:
                child.hung = f"no new step for {limit:g} minutes (resources.hang_min)"
                _kill(process)


def _progress(process: BaseProcess, cell: Cell) -> Any:
    """Return what changes while a cell gets on: its step; before the first, the CPU time it has used."""
    with suppress(DataError):  # a damaged file is told of elsewhere; the CPU time shows as much
        step = latest(cell.folder, "step").get("step", 0)
        if step:
            return step
    try:
        tree = psutil.Process(process.pid)
        times = [p.cpu_times() for p in (tree, *tree.children(recursive=True))]
    except psutil.NoSuchProcess:
        return None
    return "s", int(sum(t.user + t.system for t in times))


def _kill(process: BaseProcess) -> None:
    """End a child and what it has started."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for part in tree:
        part.kill()
    process.kill()


def _may_start(cell: Cell) -> bool:
    return not cell.waits_for()


def gpus_for(cell: Cell, present: list[int]) -> int:
    """Return how many GPUs `cell` gets on a machine that has `present`."""
    asked: int | None = cell.config.resources.gpus
    return min(1, len(present)) if asked is None else asked


def worker_command(folder: Path, resources: "ResourcesConfig") -> list[str]:
    """Return the command that trains a cell in several processes, through srun in a SLURM job."""
    worker = ["-m", "runner.launch.worker", str(folder)]
    if "SLURM_JOB_ID" in os.environ:
        shape = [f"--nodes={resources.nodes}", f"--ntasks-per-node={resources.per_node}"]
        cores = max(1, resources.cpus // resources.per_node)
        shape += [f"--ntasks={resources.num_processes}", f"--cpus-per-task={cores}"]
        # The pool is a step of this job itself: the ranks share its cores and memory.
        step = ["srun", "--overlap", "--mem=0", "--kill-on-bad-exit=1"]
        return [*step, *shape, sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    return [sys.executable, *torchrun, f"--nproc-per-node={resources.per_node}", *worker]


def _child(folder: str, threads: int, gpus: list[int], resources: "ResourcesConfig") -> None:
    """In the forked child: take the share of the machine that the launcher gave, then work."""
    os.environ["ESPALIER_LAUNCHED"] = "1"
    if "SLURM_JOB_ID" not in os.environ:  # a job has it from the launcher that waits for it
        os.environ[FED] = "1"
    threads = max(1, threads // resources.per_node)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if resources.num_processes > 1:
        for number in FOR_CELLS:  # ignored in the template
            signal.signal(number, signal.SIG_DFL)
        os.environ["MASTER_ADDR"] = socket.gethostname()
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)
        command = worker_command(Path(folder), resources)
        os.execvp(command[0], command)
    import torch  # noqa: PLC0415

    from runner.launch.worker import run_cell  # noqa: PLC0415

    torch.set_num_threads(threads)
    code = run_cell(Path(folder))
    sys.stdout.flush()
    util._run_finalizers(0)  # type: ignore[attr-defined]  # gives back semaphores, of compiling for example
    os._exit(code)


def count_gpus() -> list[int]:
    """Return the indices of this machine's GPUs by NVML: torch would initialise CUDA."""
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return list(range(pynvml.nvmlDeviceGetCount()))
