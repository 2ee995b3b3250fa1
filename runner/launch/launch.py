"""Reconcile, then run: done cells are skipped, interrupted ones resumed, failed ones on request."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
from rich.console import Console
from rich.live import Live

from runner.launch import policy
from runner.launch.mlflow_process import finish_feeder, start_feeder
from runner.launch.policy import PRUNED_TOO, Policy
from runner.launch.pool import Pool, count_gpus, gpus_for
from runner.machine import environment
from runner.machine.errors import ConfigError
from runner.records import journal
from runner.records.cells import Cell, freeze_cell, join_sweep
from runner.records.config import validate
from runner.views.table import LiveTable

_SHOW_EVERY_S = 0.5

if TYPE_CHECKING:
    from runner.launch.study import Study


class Backend(Protocol):
    """Where cells run.

    Args:
        memory_gb: of its machine, None where it is not known.
        waits: whether `run` returns when the cells have ended, or as soon as they are under way.
    """

    memory_gb: float | None
    waits: bool

    def record(self) -> dict[str, Any]:
        """Return what makes the same backend again: `espalier retry` uses the last one."""

    def run(self, cells: list[Cell], again: tuple[str, ...], view: "View") -> None:
        """Run those of `cells` whose state is in `again` and return when none runs any more."""

    def run_study(self, study: "Study", view: "View") -> None:
        """Run the trials of a study until all are taken and none runs any more."""

    def leave(self) -> str:
        """Ctrl-C was pressed: make `run` return, and say what becomes of the cells."""


class View:
    """What the person at the terminal sees: lines, and below them the live table."""

    def __init__(self, console: Console, live: Live, table: LiveTable) -> None:
        self.console, self.live, self.table = console, live, table
        self._shown = 0.0

    def say(self, line: str) -> None:
        """Print a line above the table."""
        self.console.print(line)

    def tick(self) -> None:
        """Show the table as of now, a few times a second at most: it reads every cell."""
        if time.monotonic() - self._shown >= _SHOW_EVERY_S:
            self.live.update(self.table.render())
            self._shown = time.monotonic()


def launch(cells: list[Cell], backend: Backend, policies: Policy, *, retry_failed: bool) -> int:
    """Run what is left of `cells` and return the exit code of the sweep."""
    console = Console(stderr=True)
    again = ("new", "interrupted", *(["failed"] if retry_failed else []))
    from runner.views.plan import check  # noqa: PLC0415  (torch, which the pool's template imports meanwhile)

    check([cell for cell in cells if cell.state in again], backend.memory_gb)
    for cell in cells:
        freeze_cell(cell)
    sweep = join_sweep(cells[0].config.name, cells)
    states = Counter(cell.state for cell in cells)
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    left_to_run = sum(states[state] for state in again)
    policy.start(sweep, policies, fresh=left_to_run > 0)
    journal.write_whole(sweep / "launcher.json", json.dumps(backend.record()))
    console.print(f"[bold]{sweep.name}[/bold]: {len(cells)} cells ({counts}); {left_to_run} to run")
    drifted = [c for c in cells if c.state == "finished" and environment.drift(c.folder)]
    if drifted:
        console.print(
            f"{len(drifted)} finished cells drifted and are kept ({environment.drift(drifted[0].folder)})"
        )
    if states["failed"] and not retry_failed:
        console.print("failed cells are retried with hydra.sweeper.retry_failed=true")
    table = LiveTable(cells)
    if _attend(backend, cells[0], console, table, lambda view: backend.run(cells, again, view)):
        return 130
    if not backend.waits:
        console.print(f"under way: `espalier status {sweep.name} --watch`")
        return 0
    policy.tell(sweep)
    return report(cells, sweep, console)


def launch_study(study: "Study", base: Cell, backend: Backend, policies: Policy) -> int:
    """Run what is left of a study's trials and return the exit code: 1 if one failed."""
    console = Console(stderr=True)
    policy.start(study.folder, policies, fresh=not study.is_over())
    console.print(f"[bold]{study.folder.name}[/bold]: {study.best()}; {study.cfg.trials} in all")
    table = LiveTable(study.cells)
    left = _attend(backend, base, console, table, lambda view: backend.run_study(study, view))
    console.print(study.best())
    if left or not backend.waits:
        return 130 if left else 0
    if study.is_over():
        policy.tell(study.folder, PRUNED_TOO)
    failed = [cell for cell in study.cells() if cell.state == "failed"]
    return report(failed, study.folder, console)


def _attend(
    backend: Backend, first: Cell, console: Console, table: LiveTable, run: Callable[["View"], None]
) -> bool:
    """Let the backend run with the table shown and MLflow fed; True where the user left early."""
    # Without anybody here to feed a server, each job of the cluster does so itself.
    feeder = start_feeder(first.config) if backend.waits else None
    left: list[str] = []

    def leave(*_: Any) -> None:
        left[:] = [backend.leave()]

    before = signal.signal(signal.SIGINT, leave)
    try:
        with Live(table.render(), console=console, refresh_per_second=4) as live:
            run(View(console, live, table))
            live.update(table.render())
    finally:
        signal.signal(signal.SIGINT, before)
        if not finish_feeder(feeder):
            name = first.config.name
            console.print(f"MLflow has not got everything; `espalier sync {name}` delivers it")
    if left:
        console.print(left[0])
    return bool(left)


def report(cells: list[Cell], sweep: Path, console: Console) -> int:
    """Name the cells that did not end well and return the exit code: 1 if there are any."""
    bad = [cell for cell in cells if cell.state not in ("finished", "diverged")]
    for cell in bad:
        before = journal.state(cell.upstream) if cell.upstream else None
        if cell.upstream and before != "finished":
            why = f"starts from {cell.upstream.name[:6]}, which is {before}"
        else:
            why = f"see {cell.folder}/log.txt"
        console.print(f"[red]{cell.state}[/red] {cell.label}: {why}")
    halted = policy.halted(bad[0]) if bad else None
    if halted:
        console.print(halted)
    elif any(cell.state == "failed" for cell in bad):
        console.print(f"by cause: `espalier failures {sweep.name}`")
    return 1 if bad else 0


def last_backend(sweep: Path, jobs: int | None) -> Backend:
    """Return the backend of a sweep's last start, or this machine with `jobs` places."""
    from runner.launch.slurm import Slurm, SlurmConfig  # noqa: PLC0415
    from runner.records.config import typed  # noqa: PLC0415

    file = sweep / "launcher.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"launcher": ""}
    if jobs is None and record["launcher"] == "slurm":
        return Slurm(typed("hydra.launcher", SlurmConfig, record["keys"]))
    return Local(jobs or record.get("jobs"))


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

    def run(self, cells: list[Cell], again: tuple[str, ...], view: View) -> None:
        """Run the cells here; those that run under another launcher are waited for."""
        todo = [cell for cell in cells if cell.state in again]
        elsewhere = [cell for cell in cells if cell.state == "running"]
        for cell in todo:
            cell.cancelled.unlink(missing_ok=True)
            freeze_cell(cell, anew=True)
        if elsewhere:
            view.say(f"{len(elsewhere)} run under another launcher; waiting for them too")
        self.pool = self._pool(todo + elsewhere)
        device = "cuda" if self.pool.gpus else "cpu"
        for line in {r.notice(device) for r in {c.config.precision for c in todo}} - {None}:
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
