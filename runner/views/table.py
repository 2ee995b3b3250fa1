"""The live table of a sweep: cell, state, step, loss, tokens/s, time left."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rich.table import Table

from runner.machine.errors import StorageError
from runner.records import journal
from runner.records.cells import Cell

_TAIL_BYTES = 4096
_STYLES = {"finished": "green", "failed": "red", "diverged": "yellow", "running": "cyan"}


class LiveTable:
    """Reads the tail of each running cell's metrics; ended cells are read once.

    Args:
        cells: of the sweep, or a function that returns those that there are by now.
    """

    def __init__(self, cells: list[Cell] | Callable[[], list[Cell]]) -> None:
        self.cells = cells if callable(cells) else lambda: cells
        self.queued: Callable[[], Collection[str]] = tuple  # the cells that wait in a queue
        self._ended: dict[str, tuple[str, dict[str, Any]]] = {}

    def render(self) -> Table:
        """Return the table as of now."""
        table = Table(box=None, pad_edge=False)
        for column in ("cell", "run", "state", "step", "loss", "val loss", "tokens/s", "left"):
            words = column in ("cell", "run", "state")
            table.add_column(column, justify="left" if words else "right")
        queue = self.queue()
        for cell in self.cells():
            state, last = self._read(cell)
            if cell.fingerprint in queue and state != "running":
                state = "queued"
            left = _left(last) if state == "running" else ""
            table.add_row(
                cell.label, cell.fingerprint[:6], f"[{_STYLES.get(state, 'dim')}]{state}[/]",
                f"{last.get('step', 0)}/{last.get('steps', '?')}", _number(last.get("loss")),
                _number(last.get("val_loss")), _number(last.get("tokens_per_s"), 0), left,
            )  # fmt: skip
        return table

    def queue(self) -> Collection[str]:
        """Return the cells that wait in a queue, as far as the scheduler answers."""
        try:
            return self.queued()
        except StorageError:  # the scheduler does not answer: the journal is what is known
            return ()

    def _read(self, cell: Cell) -> tuple[str, dict[str, Any]]:
        if cell.fingerprint in self._ended:
            return self._ended[cell.fingerprint]
        state = cell.state
        last = tail(cell.folder) if state != "new" else {}
        if state in journal.ENDED:
            self._ended[cell.fingerprint] = (state, last)
        return state, last


def tail(folder: Path) -> dict[str, Any]:
    """Return the latest value of each metric near the end of a run's file, and its planned steps."""
    merged: dict[str, Any] = {}
    summary = folder / "summary.json"
    if summary.exists():
        merged["steps"] = json.loads(summary.read_text())["steps"]
    file = folder / "metrics.jsonl"
    if file.exists():
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
            lines = stream.read().rpartition(b"\n")[0].split(b"\n")
        for line in lines[1:] if len(lines) > 1 else lines:
            merged |= json.loads(line) if line.startswith(b"{") and line.endswith(b"}") else {}
    return merged


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _left(last: dict[str, Any]) -> str:
    step, steps, wall = last.get("step", 0), last.get("steps"), last.get("wall_s")
    if not step or not steps or not wall:
        return ""
    seconds = int(wall / step * (steps - step))
    return f"{seconds // 60}:{seconds % 60:02d}"
