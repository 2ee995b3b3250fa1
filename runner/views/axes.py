"""The axes of a sweep: the keys and choices in which its cells differ, and each cell's values."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.machine.errors import DataError
from runner.records.cells import members, read_cell

_MOST = 6
Values = dict[str, dict[str, Any]]  # by fingerprint and axis


def axes_of(root: Path, sweep: str) -> dict[str, list[Any]]:
    """Return the values of each axis of a sweep, in the order of its cells; see `values_of`."""
    axes: dict[str, dict[str, Any]] = {}
    for values in values_of(root, sweep).values():
        for key, value in values.items():
            axes.setdefault(key, {})[json.dumps(value)] = value
    return {key: list(found.values()) for key, found in axes.items()}


def values_of(root: Path, sweep: str) -> Values:
    """Return the values of the axes for each cell of a sweep, at most six axes.

    Names chosen in groups come first, and stand for the keys of their node. A cell whose record
    cannot be read has none.
    """
    cells = {}
    for row in members(root, sweep):
        with suppress(DataError, OSError):
            science = read_cell(root / "runs" / row["fingerprint"])["science"]
            choices = {k: v for k, v in row.get("choices", {}).items() if k != "evaluates"}
            cells[row["fingerprint"]] = choices | science
    known: dict[str, set[str]] = {}
    for values in cells.values():
        for key, value in values.items():
            known.setdefault(key, set()).add(json.dumps(value))
    varied = [key for key, values in known.items() if len(values) > 1]
    chosen = {key for key in varied if "." not in key}
    axes = [key for key in varied if key in chosen or key.partition(".")[0] not in chosen]
    axes = sorted(axes, key=lambda key: "." in key)[:_MOST]
    return {run: {k: values[k] for k in axes if k in values} for run, values in cells.items()}
