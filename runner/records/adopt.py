"""Adopt an existing run for a cell whose fingerprint changed by a rename, not by its content."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, find_folder, freeze_cell, join_sweep, read_cell
from runner.records.difference import difference

_NOT_COPIED = {"cell.json", "mlflow", "views"}


def adopt(cells: Sequence[Cell], reference: str, reason: str) -> tuple[Cell, dict[str, object]]:
    """Copy the run `reference` into the new cell nearest to it; return (cell, changed keys).

    Nearest is the cell whose science differs in the fewest keys. Checkpoints are hard-linked;
    adopted.json records the source, the reason and the difference.

    Raises:
        ConfigError: the reason is empty, no cell is new, or several are equally near.
    """
    if not reason.strip():
        raise ConfigError("an adopted run needs a reason, --reason 'what was renamed'")
    root = Path(cells[0].config.root).resolve()
    folder = find_folder(root, reference)
    old = read_cell(folder)  # not load_cell: its classes may be gone
    candidates = sorted(
        ((difference(old["science"], c.science), c) for c in cells if c.state == "new"),
        key=lambda pair: len(pair[0]),
    )
    if not candidates:
        raise ConfigError(f"no cell is new: there is nothing for {folder.name} to be bound to")
    keys, cell = candidates[0]
    tied = [c.label for other, c in candidates if len(other) == len(keys)]
    if len(tied) > 1:
        raise ConfigError(
            f"{', '.join(tied)} differ from {folder.name} equally little; "
            "narrow the grid by overrides"
        )
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    for source in folder.iterdir():
        if source.name in _NOT_COPIED or source.name.startswith("."):
            continue
        target = cell.folder / source.name
        if source.is_dir():
            link = os.link if source.name == "checkpoints" else shutil.copy2
            shutil.copytree(source, target, copy_function=link)
        else:
            shutil.copy2(source, target)
    changed = {key: list(pair) for key, pair in keys.items()}
    note = {
        "from": old["fingerprint"],
        "reason": reason,
        "time": time.time(),
        "difference": changed,
    }
    storage.write_atomically(cell.folder / "adopted.json", json.dumps(note, indent=1))
    return cell, dict(keys)
