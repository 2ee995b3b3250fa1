"""This machine as a backend."""

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
        """Return the number of places."""
        return {"launcher": "local", "jobs": self.jobs}

    def prepare(self) -> None:
        """Let the template of the workers import torch."""
        warm_up()

    def run(self, cells: list[Cell], again: tuple[str, ...], view: View) -> None:
        """Run the cells here; those that run under another launcher are waited for."""
        todo = [cell for cell in cells if cell.state in again]
        elsewhere = [cell for cell in cells if cell.state == "running"]
        for cell in todo:
            cell.cancelled.unlink(missing_ok=True)
            freeze_cell(cell, overwrite=True)
        if elsewhere:
            view.say(f"{len(elsewhere)} run under another launcher; waiting for them too")
        self.pool = self._pool(todo + elsewhere)
        device = "cuda" if self.pool.gpus else "cpu"
        recipes = [c.config.precision for c in todo if hasattr(c.config.precision, "notice")]
        each_once = {repr(recipe): recipe for recipe in recipes}.values()
        for line in {recipe.notice(device) for recipe in each_once} - {None}:
            view.say(line)
        self.pool.run(todo, elsewhere, view.tick)

    def run_study(self, study: "Study", view: View) -> None:
        """Run trials here, one after another in each place."""
        base = validate(study.base)
        need = Cell(base, {}, "", "")
        self.pool = self._pool([need] * study.cfg.trials)
        self.pool.source = study
        self.pool.run([], [], view.tick)

    def leave(self) -> str:
        """Let every running cell save and stop."""
        self.pool.stop()
        return "stopped; every running cell saved its state. Run the same command to go on."

    def _pool(self, cells: list[Cell]) -> Pool:
        """Return a pool with threads divided among its places.

        Raises:
            ConfigError: a cell needs more GPUs or nodes than there are.
        """
        gpus = count_gpus()
        need = max((gpus_for(cell, gpus) for cell in cells), default=0)
        nodes = max((cell.config.resources.nodes for cell in cells), default=1)
        if need > len(gpus):
            raise ConfigError(
                f"resources.gpus={need} but this machine has {len(gpus)}; lower it, or choose another machine"
            )
        if nodes > 1:
            raise ConfigError(f"resources.nodes={nodes} needs hydra/launcher=slurm")
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        automatic = len(gpus) // need if need else (cores if cores <= 4 else cores // 4)
        places = max(1, min(self.jobs or automatic, len(cells) or 1))
        return Pool(jobs=places, threads=max(1, cores // places), gpus=gpus)
