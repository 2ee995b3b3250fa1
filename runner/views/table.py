"""The live table of a sweep: for each cell state, step, loss, measure, tokens/s and time left."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from runner.machine.errors import StorageError
from runner.records import journal, metrics
from runner.records.cells import Cell
from runner.records.metrics import LatestValues, measure_of
from runner.records.sweep_cells import UnreadableCell
from runner.views.speed import tokens_per_s

Row = Cell | UnreadableCell
_KEYS = ("step", "loss", "tokens_per_s", "wall_s")
_DEFAULT = "val_loss"  # the measure of a task that names none
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
        self._measures: dict[str, str] = {}

    def render(self) -> RenderableType:
        """Return the current table and, below it, a line for each cell that could not be read."""
        queue, unreadable, rows = self.queue(), list[str](), []
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
            rows.append((cell, state, last))
        begun = [
            self._measures[c.fingerprint] for c, _, _ in rows if c.fingerprint in self._measures
        ]
        measures = list(dict.fromkeys(begun)) or [_DEFAULT]
        table = Table(box=None, pad_edge=False)
        for column in ("cell", "run", "state"):
            table.add_column(column)
        names = [measure.replace("_", " ") for measure in measures]
        for column in ("step", "loss", *names, "tokens/s", "left"):
            table.add_column(column, justify="right")
        for cell, state, last in rows:
            table.add_row(
                cell.label,
                cell.fingerprint[:6],
                f"[{_STYLES.get(state, 'dim')}]{state}[/]",
                f"{last.get('step', 0)}/{last.get('steps', '?')}",
                _number(last.get("loss")),
                *(_number(last.get(measure)) for measure in measures),
                _number(last.get("tokens_per_s"), 0),
                time_left(last) if state == "running" else "",
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
            last = self._reader(cell).read()
        if state in journal.FINAL:
            if "tokens_per_s" in last:  # while it runs, that of the last interval
                last |= {"tokens_per_s": tokens_per_s(metrics.read(cell.folder))}
            self._ended[cell.fingerprint] = (state, last)
        return state, last

    def _reader(self, cell: Row) -> LatestValues:
        """Return the reader of the metrics of `cell`; its measure is known once it has begun."""
        key = cell.fingerprint
        if key not in self._measures:
            measure = measure_of(cell.folder)
            if key not in self._latest or measure not in (None, _DEFAULT):
                self._latest[key] = LatestValues(cell.folder, *_KEYS, measure or _DEFAULT)
            if measure is not None:
                self._measures[key] = measure
        return self._latest[key]


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def time_left(last: dict[str, Any]) -> str:
    """Return the training time left, "m:ss", from `step`, `steps` and `wall_s`; "" if unknown."""
    step, steps, wall = last.get("step", 0), last.get("steps"), last.get("wall_s")
    if not step or not steps or not wall:
        return ""
    seconds = int(wall / step * (steps - step))
    return f"{seconds // 60}:{seconds % 60:02d}"
