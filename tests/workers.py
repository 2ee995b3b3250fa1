"""Cells run by workers of their own, and what they logged."""

from collections import defaultdict
from contextlib import closing
from itertools import count

from runner.machine.ranks import Ranks
from runner.records import journal, metrics
from runner.records.cells import Cell, freeze_cell
from tests.command_server import Command, start

_LOGGED = ("loss", "grad_norm", "val_loss", "val_loss_average", "lr", "tokens")


def start_worker(cell: Cell) -> Command:
    """Freeze `cell` and start the process that runs it."""
    freeze_cell(cell)
    return start("runner.launch.worker", str(cell.folder))


def train_here(cell: Cell, *, stop_after: int | None = None) -> dict[str, list[float]]:
    """Run `cell` in this process, stopped once after some steps if given; return what it logged."""
    if not (cell.folder / "cell.json").exists():
        freeze_cell(cell)
    for last in (False, True) if stop_after is not None else (True,):
        attempt = journal.claim(cell.folder)
        assert attempt is not None
        with closing(journal.Journal(cell.folder, attempt)) as writer:
            asked = count()
            stop = (lambda: False) if last else (lambda asked=asked: next(asked) >= stop_after)
            outcome = cell.config.work.run(cell, cell.inputs, writer, Ranks("cpu"), stop)
            writer.event(outcome)
        assert outcome == ("finished" if last else "interrupted")
    values: dict[str, list[float]] = defaultdict(list)
    for row in metrics.read(cell.folder):
        for key, value in row.items():
            values[key].append(value)
    return dict(values)


def logged(cell: Cell) -> dict[tuple[int, str], float]:
    """Return what training logged and counts, by (step, key)."""
    rows = metrics.read(cell.folder)
    return {(row["step"], key): row[key] for row in rows for key in _LOGGED if key in row}
