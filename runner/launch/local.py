"""The backend of this machine; the pool is imported once there is something to run."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil

from runner.launch.backend import View
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, renew_cell
from runner.records.config import validate
from runner.records.journal import StopFlag

if TYPE_CHECKING:
    from runner.launch.pool import Pool
    from runner.launch.study import Study


class Local:
    """This machine: the fork-server pool, `jobs` cells at a time."""

    def __init__(self, jobs: int | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise ConfigError(f"hydra.launcher.jobs={jobs} must be at least 1")
        self.jobs, self.waits = jobs, True
        self.pool: Pool | None = None
        self._left = StopFlag()
        self.memory_gb: float | None = psutil.virtual_memory().total / 1e9

    def record(self) -> dict[str, Any]:
        """Return the number of cells at a time."""
        return {"launcher": "local", "jobs": self.jobs}

    def check(self, cells: Sequence[Cell]) -> None:
        """See `Backend`."""
        from runner.launch.pool import count_gpus, gpus_for  # noqa: PLC0415

        present = count_gpus()
        need = max((gpus_for(cell, present) for cell in cells), default=0)
        nodes = max((cell.config.resources.nodes for cell in cells), default=1)
        if need > len(present):
            raise ConfigError(
                f"resources.gpus={need} but this machine has {len(present)}; "
                "lower it, or choose another machine"
            )
        if nodes > 1:
            raise ConfigError(f"resources.nodes={nodes} needs hydra/launcher=slurm")

    def prepare(self) -> None:
        """Start the fork server, which imports torch."""
        from runner.launch.fork_server import warm_up  # noqa: PLC0415

        warm_up()

    def run(self, cells: list[Cell], again: tuple[str, ...], view: View) -> None:
        """Run the cells here; wait for those that run under another launcher."""
        states = {cell.fingerprint: cell.state for cell in cells}  # read once: cells may end now
        todo = [cell for cell in cells if states[cell.fingerprint] in again]
        elsewhere = [cell for cell in cells if states[cell.fingerprint] == "running"]
        for cell in todo:
            renew_cell(cell)
        if elsewhere:
            view.print(f"{len(elsewhere)} run under another launcher; waiting for them too")
        pool = self._pool(todo + elsewhere)
        device = "cuda" if pool.gpus else "cpu"
        recipes = [c.config.precision for c in todo if hasattr(c.config.precision, "notice")]
        distinct = {repr(recipe): recipe for recipe in recipes}.values()
        for line in {recipe.notice(device) for recipe in distinct} - {None}:
            view.print(line)
        pool.run(todo, elsewhere, view.refresh)
        if pool.stopping:
            view.print(_stopped(cells))

    def run_study(self, study: "Study", view: View) -> None:
        """Run trials here, `jobs` at a time; wait for those that run under another launcher."""
        typical = Cell(validate(study.base), {}, "", "")
        pool = self._pool([typical] * study.cfg.trials)
        pool.source = study
        pool.run([], [], view.refresh)
        while not pool.stopping:
            elsewhere = [cell for cell in study.open_cells() if cell.state == "running"]
            if not elsewhere:
                return
            view.print(f"{len(elsewhere)} run under another launcher; waiting for them too")
            pool.run([], elsewhere, view.refresh)
        view.print(_stopped(study.cells()))

    def leave(self) -> str:
        """Make every running cell save and stop; when called again, kill them."""
        if not self._left.is_set():
            self._left.set()
            if self.pool is not None:
                self.pool.stop()
            return (
                "stopping: running cells save their state; Ctrl-C again kills them, and they lose "
                "what they did since their last checkpoint"
            )
        if self.pool is None or not self._left.is_old():
            return "running cells still save their state; Ctrl-C again kills them"
        return f"{self.pool.kill()} running cells killed; they go on from their last checkpoints"

    def _pool(self, cells: list[Cell]) -> "Pool":
        """Make the pool, which divides the cores among the cells that run at a time."""
        from runner.launch.pool import Pool, count_gpus, gpus_for  # noqa: PLC0415

        gpus = count_gpus()
        need = max((gpus_for(cell, gpus) for cell in cells), default=0)
        cores = _num_cores()
        automatic = len(gpus) // need if need else (cores if cores <= 4 else cores // 4)
        jobs = max(1, min(self.jobs or automatic, len(cells) or 1))
        self.pool = Pool(jobs=jobs, threads=max(1, cores // jobs), gpus=gpus)
        self.pool.stopping = self._left.is_set()  # before there was a pool to stop
        return self.pool


def _stopped(cells: Sequence[Cell]) -> str:
    """Return a line: how many cells are in which state, and whether anything is left to run."""
    states = Counter(cell.state for cell in cells)
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    left = "; the same command goes on" if {"new", "interrupted"} & set(states) else ""
    return f"stopped: {counts}{left}"


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
