"""Launches a sweep: skips cells that have ended, resumes interrupted ones, retries on request."""

import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from runner.launch import policy
from runner.launch.backend import Backend, View
from runner.launch.backends import recorded
from runner.launch.mlflow_process import UploaderProcess, finish_uploader, start_uploader
from runner.launch.policy import STUDY_ENDED, Policy
from runner.machine.errors import ConfigError
from runner.records import journal
from runner.records.cells import Cell, freeze_cell, join_sweep
from runner.records.config import RunConfig, root_option
from runner.records.drift import drifted
from runner.records.failures import why_no_worker
from runner.records.slurm_queue import log_without_worker
from runner.views.mlflow import delivered
from runner.views.other_views import is_behind
from runner.views.table import LiveTable

if TYPE_CHECKING:
    from runner.launch.study import Study


_UNFINISHED = ("new", "interrupted")


def launch(
    cells: list[Cell], backend: Backend, policies: Policy, *, again: tuple[str, ...] = _UNFINISHED
) -> int:
    """Run the cells whose state is in `again` and return the sweep's exit code.

    It is 0 if all cells ended well or are under way, 1 if not, 130 after Ctrl-C.

    Raises:
        ConfigError: a cell does not fit the machine.
    """
    console = Console(stderr=True)
    now = {cell.fingerprint: cell.state for cell in cells}  # read once: cells may end meanwhile
    todo = [cell for cell in cells if now[cell.fingerprint] in again]
    if todo:
        backend.prepare()
        # Imports torch, as the fork server does meanwhile.
        from runner.views.plan import check  # noqa: PLC0415

        for remark in check(todo, backend.memory_gb):
            console.print(remark, soft_wrap=True)
        backend.check(todo)
    for cell in cells:
        freeze_cell(cell)
    sweep = join_sweep(cells[0].config.name, cells)
    states = Counter(now.values())
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    policy.start(sweep, policies, fresh=bool(todo))
    console.print(f"[bold]{sweep.name}[/bold]: {len(cells)} cells ({counts}); {len(todo)} to run")
    for line in drifted(cells):
        console.print(line, soft_wrap=True)
    if states["failed"] and "failed" not in again:
        console.print(f"failed cells run again with `espalier retry {sweep.name}`")
    table = LiveTable(cells)
    if not todo and not states["running"]:
        console.print(table.render())
        _upload_rest(cells[0].config, sweep, console)
        return _end(cells, sweep, console)
    with recorded(sweep, backend):
        left = _run_live(
            backend, cells[0], console, table, lambda view: backend.run(cells, again, view)
        )
    if left:
        return 130
    if not backend.waits:
        console.print(f"under way: `espalier status {sweep.name} --watch`")
        return 0
    return _end(cells, sweep, console)


def _end(cells: list[Cell], sweep: Path, console: Console) -> int:
    """Notify and say what has not finished, or else what comes next; return the exit code."""
    policy.notify(sweep)
    code = _report_unfinished(cells, sweep, console)
    if code == 0:
        root = root_option(cells[0].config)
        verbs = (f"espalier plots {sweep.name}{root}", f"espalier ui{root}")
        console.print(f"next: {' or '.join(f'`{verb}`' for verb in verbs)}", soft_wrap=True)
    return code


def launch_study(
    study: "Study", base: Cell, backend: Backend, policies: Policy, changed: Sequence[str] = ()
) -> int:
    """Run the remaining trials of a study and return the exit code.

    It is 1 if a trial failed or has no outcome, 130 after Ctrl-C.

    Args:
        changed: the keys in which it differs from the study that the sweep had before.

    Raises:
        ConfigError: no run logs the metric, or no point drawn was valid.
    """
    console = Console(stderr=True)
    over = study.is_over()
    if not over:
        backend.prepare()
        for cell in study.open_cells():
            cell.cancelled.unlink(missing_ok=True)
    policy.start(study.folder, policies, fresh=not over)
    if changed:
        console.print(f"another study than the last of {study.folder.name}: {'; '.join(changed)}")
    console.print(f"[bold]{study.folder.name}[/bold]: {study.best()}; {study.cfg.trials} in all")
    if over and study.cells():
        _upload_rest(base.config, study.folder, console)
    if not over:
        table = LiveTable(study.cells)
        backend.check([base])
        with recorded(study.folder, backend):
            left = _run_live(
                backend, base, console, table, lambda view: backend.run_study(study, view)
            )
        over = study.is_over()
        console.print(study.best())
        if left or not backend.waits:
            return 130 if left else 0
    return _report_study(study, over, console)


def _report_study(study: "Study", over: bool, console: Console) -> int:
    """Print what a study lacks; return the exit code, 1 if a trial failed or is open."""
    invalid, cells = study.invalid_points(), study.cells()
    if invalid and not cells:
        raise ConfigError(f"none of {len(invalid)} drawn points is valid: {invalid[0]}")
    if over:
        policy.notify(study.folder, STUDY_ENDED)
    if invalid:
        console.print(
            f"{len(invalid)} drawn points are invalid, which counts as pruned: {invalid[0]}",
            markup=False,
        )
    problem = study.problem()
    if problem is not None:
        raise ConfigError(problem)
    if not over:
        console.print(f"{study.num_open()} trials are open; the same command goes on with them")
    failed = [cell for cell in cells if cell.state == "failed"]
    return _report_unfinished(failed, study.folder, console) or int(not over)


def _run_live(
    backend: Backend, first: Cell, console: Console, table: LiveTable, run: Callable[["View"], None]
) -> bool:
    """Run cells with the live table and an uploader; return whether the user left by Ctrl-C."""
    # If nobody waits here, each job of the cluster uploads to an MLflow server itself.
    uploader = start_uploader(first.config) if backend.waits else None
    left = False
    before = signal.getsignal(signal.SIGINT)
    try:
        with Live(table.render(), console=console, refresh_per_second=4) as live:
            view = View(console, live, table)

            def leave(*_: Any) -> None:
                nonlocal left
                left = True
                view.notify(backend.leave())

            signal.signal(signal.SIGINT, leave)
            run(view)
            view.refresh()
            live.update(table.render())
    finally:
        if not console.is_terminal:  # rich ends the table's last line at terminals only
            console.line()
        signal.signal(signal.SIGINT, before)
        _finish(uploader, console)
    return left


def _upload_rest(run: RunConfig, sweep: Path, console: Console) -> None:
    """Upload to MLflow and to the further views what an earlier launch could not."""
    behind = run.track.uri != "off" and not delivered(sweep, run.track.uri)
    if behind or any(is_behind(sweep, view) for view in run.track.also):
        _finish(start_uploader(run), console)


def _finish(uploader: UploaderProcess | None, console: Console) -> None:
    for line in finish_uploader(uploader):
        console.print(line, markup=False)


def _report_unfinished(cells: list[Cell], sweep: Path, console: Console) -> int:
    """Print the cells that did not end well; return the exit code, 1 if there are any."""
    bad = [cell for cell in cells if cell.state not in journal.FINAL]
    for cell in bad:
        inputs = cell.waits_for()
        if inputs:
            state = journal.state(cell.folder.parent / inputs[0])
            more = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
            why = f"waits for {inputs[0][:6]}, which is {state}{more}"
        elif log := log_without_worker(cell):
            why = ": ".join(why_no_worker(log))
        else:
            why = f"see {cell.folder}/log.txt"
        console.print(f"[red]{cell.state}[/red] {cell.label}: {why}")
    halted = policy.halted(bad[0]) if bad else None
    if halted:
        console.print(halted)
    elif any(cell.state == "failed" for cell in bad):
        console.print(
            f"by cause: `espalier failures {sweep.name}`; again: `espalier retry {sweep.name}`"
        )
    return 1 if bad else 0
