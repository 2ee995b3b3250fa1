"""Cells run by workers of their own, and what they logged."""

from runner.records import metrics
from runner.records.cells import Cell, freeze_cell
from tests.command_server import Command, start

_LOGGED = ("loss", "grad_norm", "val_loss", "val_loss_average", "lr", "tokens")


def start_worker(cell: Cell) -> Command:
    """Freeze `cell` and start the process that runs it."""
    freeze_cell(cell)
    return start("runner.launch.worker", str(cell.folder))


def logged(cell: Cell) -> dict[tuple[int, str], float]:
    """Return what training logged and counts, by (step, key)."""
    rows = metrics.read(cell.folder)
    return {(row["step"], key): row[key] for row in rows for key in _LOGGED if key in row}
