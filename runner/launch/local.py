"""The backend of this machine."""

import os
from typing import TYPE_CHECKING, Any

import psutil

from runner.launch.backend import View
from runner.launch.fork_server import warm_up
from runner.launch.pool import Pool, count_gpus, gpus_for
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, freeze_cell
from runner.records.config import validate

if TYPE_CHECKING:
    from runner.launch.study import Study


class Local:
    """This machine: the fork-server pool, `jobs` cells at a time."""

    def __init__(self, jobs: int | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise ConfigError(f"hydra.launcher.jobs={jobs} must be at least 1")
        self.jobs, self.waits = jobs, True
        self.memory_gb: float | None = psutil.virtual_memory().total / 1e9

    def record(self) -> dict[str, Any]:
        """Return the number of cells at a time."""
        return {"launcher": "local", "jobs": self.jobs}

    def prepare(self) -> None:
        """Start the fork server, which imports torch."""
        warm_up()

    def run(self, cells: list[Cell], again: tuple[str, ...], view: View) -> None:
        """Run the cells here; wait for those that run under another launcher."""
        todo = [cell for cell in cells if cell.state in again]
        elsewhere = [cell for cell in cells if cell.state == "running"]
        for cell in todo:
            cell.cancelled.unlink(missing_ok=True)
            freeze_cell(cell, overwrite=True)
        if elsewhere:
            view.print(f"{len(elsewhere)} run under another launcher; waiting for them too")
        self.pool = self._pool(todo + elsewhere)
        device = "cuda" if self.pool.gpus else "cpu"
        recipes = [c.config.precision for c in todo if hasattr(c.config.precision, "notice")]
        distinct = {repr(recipe): recipe for recipe in recipes}.values()
        for line in {recipe.notice(device) for recipe in distinct} - {None}:
            view.print(line)
        self.pool.run(todo, elsewhere, view.refresh)

    def run_study(self, study: "Study", view: View) -> None:
        """Run trials here, `jobs` at a time."""
        typical = Cell(validate(study.base), {}, "", "")
        self.pool = self._pool([typical] * study.cfg.trials)
        self.pool.source = study
        self.pool.run([], [], view.refresh)

    def leave(self) -> str:
        """Make every running cell save and stop."""
        self.pool.stop()
        return "stopped; every running cell saved its state. Run the same command to go on."

    def _pool(self, cells: list[Cell]) -> Pool:
        """Return a pool that divides the cores among the cells that run at a time.

        Raises:
            ConfigError: a cell needs more GPUs or nodes than there are.
        """
        gpus = count_gpus()
        need = max((gpus_for(cell, gpus) for cell in cells), default=0)
        nodes = max((cell.config.resources.nodes for cell in cells), default=1)
        if need > len(gpus):
            raise ConfigError(
                f"resources.gpus={need} but this machine has {len(gpus)}; "
                "lower it, or choose another machine"
            )
        if nodes > 1:
            raise ConfigError(f"resources.nodes={nodes} needs hydra/launcher=slurm")
        cores = _num_cores()
        automatic = len(gpus) // need if need else (cores if cores <= 4 else cores // 4)
        jobs = max(1, min(self.jobs or automatic, len(cells) or 1))
        return Pool(jobs=jobs, threads=max(1, cores // jobs), gpus=gpus)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
