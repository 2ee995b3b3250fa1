"""The live table of a sweep: a row per cell with its state, step, losses, tokens/s, time left."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runner.machine.errors import StorageError
from runner.records import journal
from runner.records.cells import Cell, UnreadableCell
from runner.records.metrics import LatestValues

Row = Cell | UnreadableCell
_KEYS = ("step", "loss", "val_loss", "tokens_per_s", "wall_s")
_STYLES = {"finished": "green", "failed": "red", "diverged": "yellow", "running": "cyan"}


class LiveTable:
    """Reads the metrics of cells as they grow; those of finished and diverged cells once.

    Args:
        cells: those of the sweep, or a function that returns the current ones.
    """

    def __init__(self, cells: Sequence[Row] | Callable[[], Sequence[Row]]) -> None:
        self.cells = cells if callable(cells) else lambda: cells
        self.queued: Callable[[], Collection[str]] = tuple  # returns queued cells' fingerprints
        self._ended: dict[str, tuple[str, dict[str, Any]]] = {}
        self._latest: dict[str, LatestValues] = {}

    def render(self) -> RenderableType:
        """Return the current table and, below it, a line for each cell that could not be read."""
        table = Table(box=None, pad_edge=False)
        for column in ("cell", "run", "state", "step", "loss", "val loss", "tokens/s", "left"):
            is_text = column in ("cell", "run", "state")
            table.add_column(column, justify="left" if is_text else "right")
        queue = self.queue()
        unreadable: list[str] = []
        for cell in self.cells():
            if isinstance(cell, UnreadableCell):
                unreadable.append(f"{cell.fingerprint[:6]} {cell.problem}")
            try:
                state, last = self._read(cell)
            except (OSError, ValueError, KeyError) as error:
                # What a table cannot read must not hide other cells or end the launcher.
                state, last = "unreadable", {}
                unreadable.append(f"{cell.fingerprint[:6]} {error}")
            if cell.fingerprint in queue and state != "running":
                state = "queued"
            left = _left(last) if state == "running" else ""
            table.add_row(
                cell.label,
                cell.fingerprint[:6],
                f"[{_STYLES.get(state, 'dim')}]{state}[/]",
                f"{last.get('step', 0)}/{last.get('steps', '?')}",
                _number(last.get("loss")),
                _number(last.get("val_loss")),
                _number(last.get("tokens_per_s"), 0),
                left,
            )
        return Group(table, *map(Text, unreadable))

    def queue(self) -> Collection[str]:
        """Return the fingerprints of queued cells, none while the scheduler does not answer."""
        try:
            return self.queued()
        except StorageError:  # the journal's states are shown instead
            return ()

    def _read(self, cell: Row) -> tuple[str, dict[str, Any]]:
        if cell.fingerprint in self._ended:
            return self._ended[cell.fingerprint]
        state = cell.state
        last: dict[str, Any] = {}
        if state not in ("new", "unreadable"):
            reader = self._latest.setdefault(cell.fingerprint, LatestValues(cell.folder, *_KEYS))
            last = reader.read()
        if state in journal.FINAL:
            self._ended[cell.fingerprint] = (state, last)
        return state, last


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _left(last: dict[str, Any]) -> str:
    step, steps, wall = last.get("step", 0), last.get("steps"), last.get("wall_s")
    if not step or not steps or not wall:
        return ""
    seconds = int(wall / step * (steps - step))
    return f"{seconds // 60}:{seconds % 60:02d}"
