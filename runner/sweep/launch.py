"""Reconcile, then run: done cells are skipped, interrupted ones resumed, failed ones on request."""

import os
from collections import Counter

from rich.console import Console
from rich.live import Live

from runner.errors import ConfigError
from runner.feed import finish_feeder, start_feeder
from runner.sweep.cells import Cell, freeze_cell, join_sweep
from runner.sweep.live import LiveTable
from runner.sweep.pool import CANCEL, Pool, count_gpus, gpus_for


def launch(cells: list[Cell], *, jobs: int | None, retry_failed: bool) -> int:
    """Run what is left of `cells` on this machine and return the exit code of the sweep."""
    console = Console(stderr=True)
    for cell in cells:
        freeze_cell(cell)
    sweep = join_sweep(cells[0].config.name, cells)
    for cell in cells:
        (cell.folder / CANCEL).unlink(missing_ok=True)
    todo, elsewhere, states = [], [], Counter[str]()
    for cell in cells:
        state = cell.state
        states[state] += 1
        if state in ("new", "interrupted") or (state == "failed" and retry_failed):
            todo.append(cell)
        elif state == "running":
            elsewhere.append(cell)
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    console.print(f"[bold]{sweep.name}[/bold]: {len(cells)} cells ({counts}); {len(todo)} to run")
    if elsewhere:
        console.print(f"{len(elsewhere)} run under another launcher; waiting for them too")
    if states["failed"] and not retry_failed:
        console.print("failed cells are retried with hydra.sweeper.retry_failed=true")
    device = "cuda" if count_gpus() else "cpu"
    for notice in {recipe.notice(device) for recipe in {c.config.precision for c in todo}} - {None}:
        console.print(notice)
    pool = make_pool(todo + elsewhere, jobs)
    feeder = start_feeder(cells[0].config)
    table = LiveTable(cells)
    try:
        with Live(table.render(), console=console, refresh_per_second=4) as live:
            pool.run(todo, elsewhere, lambda: live.update(table.render()))
            live.update(table.render())
    except KeyboardInterrupt:
        console.print("stopped; every running cell saved its state. Run the same command to go on.")
        return 130
    finally:
        if not finish_feeder(feeder):
            console.print(
                f"MLflow has not got everything; `espalier sync {sweep.name}` delivers it"
            )
    failed = [cell for cell in cells if cell.state == "failed"]
    for cell in failed:
        console.print(f"[red]failed[/red] {cell.label}: see {cell.folder}/log.txt")
    return 1 if failed else 0


def make_pool(cells: list[Cell], jobs: int | None) -> Pool:
    """Return a pool with `jobs` places, threads divided among them.

    Raises:
        ConfigError: jobs is below 1, or a cell needs more GPUs than there are.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"hydra.launcher.jobs={jobs} must be at least 1")
    gpus = count_gpus()
    need = max((gpus_for(cell, gpus) for cell in cells), default=0)
    if need > len(gpus):
        raise ConfigError(
            f"resources.gpus={need} but this machine has {len(gpus)}; lower it, or choose another machine"
        )
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    automatic = len(gpus) // need if need else (cores if cores <= 4 else cores // 4)
    places = max(1, min(jobs or automatic, len(cells) or 1))
    return Pool(jobs=places, threads=max(1, cores // places), gpus=gpus)
