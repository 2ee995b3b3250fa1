"""Runs cells on this machine, each in a child forked from a server that has imported torch.

The server is multiprocessing's forkserver with a preload list. A child that segfaults or runs out
of memory ends its own cell alone. A SLURM job runs such a pool too.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, util
from multiprocessing.context import ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from runner.launch import policy
from runner.launch.after_exit import give_up, halve_micro_batch, record_exit, was_killed
from runner.launch.fork_server import STOP_SIGNALS, warm_up
from runner.launch.mlflow_process import UPLOADER_RUNS
from runner.machine.errors import DataError
from runner.machine.memory_kill import MemoryWatch
from runner.machine.own_modules import module_command
from runner.records import journal
from runner.records.cells import Cell
from runner.records.metrics import latest

if TYPE_CHECKING:
    from runner.grid.resources import ResourcesConfig  # torch: seconds

_TICK_S, _CHECK_S = 0.25, 5.0
_RANKS_END_S = 30.0  # for ranks to end after torchrun
_START_ATTEMPTS = 3  # to start a child after the fork server was killed


class CellSource(Protocol):
    """Supplies a pool with cells one by one."""

    def next_cell(self) -> Cell | None:
        """Return a cell to run, None if there are no more."""

    def record_outcome(self, cell: Cell) -> bool:
        """Record the outcome of a cell that has run; return False if it has not ended."""

    def should_stop(self, cell: Cell) -> bool:
        """Read the progress of a running cell; return whether to stop it."""


@dataclass
class _Child:
    """A cell's process and its progress.

    Args:
        memory: watches the memory of the process.
        logged: bytes of the cell's log.txt before this attempt.
        progress: changes as the cell gets on; it last did at `since`.
        hung: why the process was killed as hanging, None if it was not.
        stopped: whether it was told to end, by a user or a study.
        ranks: the processes that torchrun has started.
        alone_since: when the ranks were first seen to outlive torchrun.
    """

    cell: Cell
    gpus: list[int]
    memory: MemoryWatch
    logged: int
    progress: Any = None
    since: float = field(default_factory=time.monotonic)
    hung: str | None = None
    stopped: bool = False
    ranks: list[psutil.Process] = field(default_factory=list)
    alone_since: float | None = None

    def note_ranks(self, process: BaseProcess) -> None:
        """Note the processes below `process`, torchrun; they may outlive it."""
        if self.cell.config.resources.num_processes > 1:
            with suppress(psutil.NoSuchProcess):
                self.ranks = psutil.Process(process.pid).children(recursive=True)

    def ranks_have_ended(self) -> bool:
        """Return whether none of the ranks is left; kill those left after half a minute."""
        left = [rank for rank in self.ranks if journal.is_alive(rank)]
        if not left:
            return True
        now = time.monotonic()
        self.alone_since = self.alone_since or now
        if now - self.alone_since > _RANKS_END_S:
            _kill_all(left)
        time.sleep(_TICK_S)
        return False

    def output(self) -> str:
        """Return what this attempt has written."""
        with suppress(OSError), open(self.cell.folder / "log.txt", "rb") as stream:
            stream.seek(self.logged)
            return stream.read().decode(errors="replace")
        return ""


@dataclass
class Pool:
    """Runs cells, `jobs` at a time.

    Args:
        jobs: the most cells at a time.
        threads: cores of each cell.
        gpus: indices of the GPUs to divide among the cells; None lets each cell see all of them.
        source: supplies further cells; those that have run are in `processed_cells`.
    """

    jobs: int
    threads: int
    gpus: list[int] | None = field(default_factory=list)
    source: CellSource | None = None
    processed_cells: list[Cell] = field(default_factory=list)
    stopping: bool = False
    _running: dict[BaseProcess, _Child] = field(default_factory=dict)

    def run(self, cells: list[Cell], elsewhere: list[Cell], tick: Callable[[], None]) -> None:
        """Run `cells` to their end and wait for the end of those running `elsewhere`.

        A cell interrupted elsewhere is continued here. After `stop` this returns when all children
        have saved; so it does before it raises what `tick` or the source raises.

        Args:
            tick: called a few times a second.
        """
        warm_up()
        self._waiting, self._watched = list(cells), list(elsewhere)
        self._free, self._last_check = list(self.gpus or []), time.monotonic()
        self._more = self.source is not None
        try:
            while self._running or (
                not self.stopping and (self._waiting or self._watched or self._more)
            ):
                if not self.stopping:
                    self._start_cells()
                tick()
                self._wait_for_ends()
                self._look_elsewhere()
            tick()
        except BaseException:
            self.stop()
            while self._running:  # else Python would wait for their ends and start no other
                self._wait_for_ends()
            raise

    def _wait_for_ends(self) -> None:
        """Wait a moment for children to end, and see to those that have and those that run on."""
        if self._running:
            connection.wait([child.sentinel for child in self._running], timeout=_TICK_S)
        else:
            time.sleep(_TICK_S)
        for process, child in list(self._running.items()):
            if not process.is_alive() and child.ranks_have_ended():
                self._reap(process)
        if time.monotonic() - self._last_check >= _CHECK_S:
            self._last_check = time.monotonic()
            self._check_running()

    def _look_elsewhere(self) -> None:
        """Take over cells that were interrupted elsewhere; forget those that ended there."""
        states = {cell.fingerprint: cell.state for cell in self._watched}
        self._waiting += [
            c for c in self._watched if states[c.fingerprint] in ("new", "interrupted")
        ]
        self._watched = [c for c in self._watched if states[c.fingerprint] == "running"]

    def stop(self) -> None:
        """Make every child save and end."""
        self.stopping = True
        for process, child in list(self._running.items()):
            child.stopped = True
            child.note_ranks(process)
            process.terminate()

    def kill(self) -> int:
        """Kill every child, which loses what it did since its last checkpoint; return how many."""
        self.stopping = True
        children = list(self._running.items())
        for process, child in children:
            child.stopped = True
            child.note_ranks(process)
            _kill(process)
        return len(children)

    def _start_cells(self) -> None:
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
            cell = next((c for c in self._waiting if _inputs_ended(c)), None)
            if cell is None:
                self._drop_unreachable()
                return
            count = 0 if self.gpus is None else gpus_for(cell, self.gpus)
            if count > len(self._free):
                return
            gpus, self._free = self._free[:count], self._free[count:]
            self._waiting.remove(cell)
            self._start(cell, gpus)

    def _drop_unreachable(self) -> None:
        """Drop waiting cells with an input that neither runs, waits nor is watched."""
        running = [child.cell for child in self._running.values()]
        pending = {c.fingerprint for c in (*self._waiting, *self._watched, *running)}
        self._waiting = [c for c in self._waiting if pending.issuperset(c.waits_for())]

    def _start(self, cell: Cell, gpus: list[int]) -> None:
        log = cell.folder / "log.txt"
        logged = log.stat().st_size if log.exists() else 0
        # The child's environment is that of the fork server, which may be older than the uploader.
        fed = UPLOADER_RUNS in os.environ
        arguments = (str(cell.folder), self.threads, gpus, cell.config.resources, fed)
        kind = SpawnProcess if sys.platform == "darwin" else ForkServerProcess
        for attempts_left in reversed(range(_START_ATTEMPTS)):
            process: BaseProcess = kind(target=_run_child, args=arguments)
            try:
                process.start()
                break
            except (EOFError, OSError):
                if not attempts_left:
                    raise
                warm_up()
        assert process.pid is not None
        self._running[process] = _Child(cell, gpus, MemoryWatch(process.pid), logged)

    def _reap(self, process: BaseProcess) -> None:
        child = self._running.pop(process)
        self._free += child.gpus
        if process.exitcode == journal.HELD:
            self._watched.append(child.cell)
            return
        cell = child.cell
        record_exit(
            cell,
            process.exitcode or 0,
            child.output() if cell.config.resources.num_processes > 1 else "",
            stopped=child.stopped,
            hung=child.hung,
            memory=child.memory.shortage(),
        )
        again = None if self.stopping else _second_try(cell)
        if again is not None:
            self._waiting.insert(0, again)
            return
        if cell.state == "failed":
            policy.note_failure(cell)
        if self.source is not None:
            self.source.record_outcome(cell)
            self.processed_cells.append(cell)

    def _check_running(self) -> None:
        """Repeat a stop that a child could not hear yet, and kill children that hang."""
        for process, child in self._running.items():
            if self.stopping or (self.source is not None and self.source.should_stop(child.cell)):
                # torchrun would give up ranks that still save at a second signal.
                if not (child.stopped and child.ranks and child.cell.state == "running"):
                    process.terminate()
                child.stopped = True
            if process.is_alive():
                child.note_ranks(process)
            child.memory.sample()
            limit = child.cell.config.resources.hang_min
            now = _progress_mark(process, child.cell)
            if now != child.progress:
                child.progress, child.since = now, time.monotonic()
            elif limit is not None and time.monotonic() - child.since > limit * 60:
                child.hung = f"no new step for {limit:g} minutes (resources.hang_min)"
                _kill(process)


def _second_try(cell: Cell) -> Cell | None:
    """Return the cell to run again if it was killed or ran out of memory, else None."""
    if was_killed(cell) and not give_up(cell):
        return cell
    return halve_micro_batch(cell)


def _progress_mark(process: BaseProcess, cell: Cell) -> Any:
    """Return a value that changes while a cell gets on: its step.

    Before the first one, and while it evaluates, its CPU time.
    """
    with suppress(DataError):  # a damaged file is reported elsewhere; the CPU time will do
        step = latest(cell.folder, "step").get("step", 0)
        if step and not journal.is_evaluating(cell.folder):
            return step
    try:
        tree = psutil.Process(process.pid)
        times = [p.cpu_times() for p in (tree, *tree.children(recursive=True))]
    except psutil.NoSuchProcess:
        return None
    return "s", int(sum(t.user + t.system for t in times))


def _kill(process: BaseProcess) -> None:
    """Kill a child and its descendants."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    process.kill()  # first: it would record the end of its parts as a failure
    _kill_all(tree)


def _kill_all(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _inputs_ended(cell: Cell) -> bool:
    return not cell.waits_for()


def gpus_for(cell: Cell, present: list[int]) -> int:
    """Return the number of GPUs of `cell` on a machine that has the GPUs `present`."""
    num_gpus: int | None = cell.config.resources.gpus
    return min(1, len(present)) if num_gpus is None else num_gpus


def worker_command(folder: Path, resources: "ResourcesConfig") -> list[str]:
    """Return the command that runs a cell in several processes: torchrun, or srun in a job."""
    worker = module_command("runner.launch.worker", str(folder))
    if "SLURM_JOB_ID" in os.environ:
        shape = [f"--nodes={resources.nodes}", f"--ntasks-per-node={resources.per_node}"]
        cores = max(1, resources.cpus // resources.per_node)
        shape += [f"--ntasks={resources.num_processes}", f"--cpus-per-task={cores}"]
        # The pool is itself a step of this job: the ranks share its cores and memory.
        step = ["srun", "--overlap", "--mem=0", "--kill-on-bad-exit=1"]
        return [*step, *shape, *worker]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    return [*torchrun, f"--nproc-per-node={resources.per_node}", *worker]


def _run_child(
    folder: str, threads: int, gpus: list[int], resources: "ResourcesConfig", fed: bool
) -> None:
    """Run a cell in the forked child, on its share of the machine, and exit with its code.

    Args:
        fed: whether the launcher has an uploader, so that the worker starts none.
    """
    os.environ["ESPALIER_LAUNCHED"] = "1"
    if fed:
        os.environ[UPLOADER_RUNS] = "1"
    threads = max(1, threads // resources.per_node)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if resources.num_processes > 1:
        for number in STOP_SIGNALS:  # ignored in the fork server
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
    # Frees semaphores, for example those of compilation.
    util._run_finalizers(0)  # type: ignore[attr-defined]
    os._exit(code)


def count_gpus() -> list[int]:
    """Return the indices of this machine's GPUs, by NVML: torch would initialise CUDA."""
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return list(range(pynvml.nvmlDeviceGetCount()))
