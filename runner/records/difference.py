"""The keys in which two configs differ, and the finished run nearest to a cell."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.machine.errors import DataError
from runner.records import journal
from runner.records.cells import Cell, read_cell

Difference = dict[str, tuple[Any, Any]]
ABSENT = "(absent)"


def difference(a: dict[str, Any], b: dict[str, Any]) -> Difference:
    """Return {key: (value in `a`, value in `b`)} for each key whose values differ."""
    keys = sorted(a.keys() | b.keys())
    pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def nearest_finished(cell: Cell) -> tuple[Path, Difference] | None:
    """Return the finished run under the same root with the fewest differing science keys.

    Returns:
        (its folder, the difference from `cell` to it), or None if no other run has finished.
    """
    best: tuple[Path, Difference] | None = None
    for file in sorted(cell.folder.parent.glob("*/cell.json")):
        folder = file.parent
        with suppress(DataError):  # a damaged run is not near
            if folder != cell.folder and journal.state(folder) == "finished":
                changed = difference(cell.science, read_cell(folder)["science"])
                if best is None or len(changed) < len(best[1]):
                    best = (folder, changed)
    return best
