"""Binding an existing run to a cell whose fingerprint changed though the experiment did not (a rename)."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, find_folder, freeze_cell, join_sweep
from runner.records.difference import difference

_OWN = {"cell.json", "mlflow"}


def adopt(cells: Sequence[Cell], reference: str, reason: str) -> tuple[Cell, dict[str, object]]:
    """Give the run `reference` to the one new cell that differs from it least; return it and how it differs.

    The run is copied (its checkpoints linked), with adopted.json saying from where and why.

    Raises:
        ConfigError: no reason, no new cell, or several that differ equally little.
    """
    if not reason.strip():
        raise ConfigError("an adopted run needs a reason, --reason 'what was renamed'")
    root = Path(cells[0].config.root).resolve()
    folder = find_folder(root, reference)
    old = json.loads((folder / "cell.json").read_text())  # its classes may be gone: that is why
    found = sorted(
        ((difference(old["science"], c.science), c) for c in cells if c.state == "new"),
        key=lambda pair: len(pair[0]),
    )
    if not found:
        raise ConfigError(f"no cell is new: there is nothing for {folder.name} to be bound to")
    if len(found) > 1 and len(found[0][0]) == len(found[1][0]):
        tied = [c.label for keys, c in found if len(keys) == len(found[0][0])]
        raise ConfigError(
            f"{', '.join(tied)} differ from {folder.name} equally little; narrow the grid by overrides"
        )
    keys, cell = found[0]
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    for source in folder.iterdir():
        if source.name in _OWN or source.name.startswith("."):
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
