"""What sets cells apart: the difference of two configs, and a cell's nearest finished neighbour."""

import json
from pathlib import Path
from typing import Any

from runner.records import journal
from runner.records.cells import Cell

Difference = dict[str, tuple[Any, Any]]
ABSENT = "(absent)"


def difference(a: dict[str, Any], b: dict[str, Any]) -> Difference:
    """Return the keys whose values differ and both values."""
    keys = sorted(a.keys() | b.keys())
    pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def nearest_finished(cell: Cell) -> tuple[Path, Difference] | None:
    """Return the finished run under the same root that differs from `cell` in the fewest science keys."""
    best: tuple[Path, Difference] | None = None
    for file in sorted(cell.folder.parent.glob("*/cell.json")):
        folder = file.parent
        if folder != cell.folder and journal.state(folder) == "finished":
            other = json.loads(file.read_text())["science"]
            found = difference(cell.science, other)
            if best is None or len(found) < len(best[1]):
                best = (folder, found)
    return best
