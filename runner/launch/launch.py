"""Reconcile, then run: done cells are skipped, interrupted ones resumed, failed ones on request."""

import json
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from runner.launch import policy
from runner.launch.backend import Backend, View
from runner.launch.mlflow_process import finish_uploader, start_uploader
from runner.launch.policy import PRUNED_TOO, Policy
from runner.machine import storage
from runner.records import journal
from runner.records.cells import Cell, freeze_cell, join_sweep
from runner.records.config import RunConfig
from runner.records.drift import drifted
from runner.views.mlflow import delivered
from runner.views.table import LiveTable

if TYPE_CHECKING:
    from runner.launch.study import Study


_LEFT = ("new", "interrupted")


def launch(
    cells: list[Cell], backend: Backend, policies: Policy, *, again: tuple[str, ...] = _LEFT
) -> int:
    """Run the cells whose state is in `again` and return the exit code of the sweep."""
    console = Console(stderr=True)
    todo = [cell for cell in cells if cell.state in again]
    if todo:
        backend.prepare()
        from runner.views.plan import check  # noqa: PLC0415  (torch, which a local worker's template imports meanwhile)

        check(todo, backend.memory_gb)
    for cell in cells:
        freeze_cell(cell)
    sweep = join_sweep(cells[0].config.name, cells)
    states = Counter(cell.state for cell in cells)
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    policy.start(sweep, policies, fresh=bool(todo))
    storage.write_atomically(sweep / "launcher.json", json.dumps(backend.record()))
    console.print(f"[bold]{sweep.name}[/bold]: {len(cells)} cells ({counts}); {len(todo)} to run")
    for line in drifted(cells):
        console.print(line)
    if states["failed"] and "failed" not in again:
        console.print(f"failed cells run again with `espalier retry {sweep.name}`")
    table = LiveTable(cells)
    if not todo and not states["running"]:
        console.print(table.render())
        _deliver_rest(cells[0].config, sweep, console)
        policy.tell(sweep)
        return report(cells, sweep, console)
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
    if not study.is_over():
        backend.prepare()
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
    uploader = start_uploader(first.config) if backend.waits else None
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
        _finish(uploader, first.config.name, console)
    if left:
        console.print(left[0])
    return bool(left)


def _deliver_rest(run: RunConfig, sweep: Path, console: Console) -> None:
    """Give MLflow what an earlier launch could not deliver."""
    if run.track.uri != "off" and not delivered(sweep, run.track.uri):
        _finish(start_uploader(run), run.name, console)


def _finish(uploader: subprocess.Popen[bytes] | None, name: str, console: Console) -> None:
    if not finish_uploader(uploader):
        console.print(f"MLflow has not got everything; `espalier sync {name}` delivers it")


def report(cells: list[Cell], sweep: Path, console: Console) -> int:
    """Name the cells that did not end well and return the exit code: 1 if there are any."""
    bad = [cell for cell in cells if cell.state not in ("finished", "diverged")]
    for cell in bad:
        awaited = cell.waits_for()
        if awaited:
            state = journal.state(cell.folder.parent / awaited[0])
            more = f" and {len(awaited) - 1} more" if len(awaited) > 1 else ""
            why = f"waits for {awaited[0][:6]}, which is {state}{more}"
        else:
            why = f"see {cell.folder}/log.txt"
        console.print(f"[red]{cell.state}[/red] {cell.label}: {why}")
    halted = policy.halted(bad[0]) if bad else None
    if halted:
        console.print(halted)
    elif any(cell.state == "failed" for cell in bad):
        console.print(f"by cause: `espalier failures {sweep.name}`")
    return 1 if bad else 0
