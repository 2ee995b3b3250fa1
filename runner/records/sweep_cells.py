"""The cells of a sweep, those that cannot be read among them: one must not hide the others."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.machine.errors import ConfigError, DataError
from runner.records import journal
from runner.records.cells import Cell, load_cell, members
from runner.records.names import run_folder


@dataclass(frozen=True)
class UnreadableCell:
    """A member of a sweep whose frozen config cannot be read; `problem` says why.

    Its file is damaged, for example, or a class that it names is gone.
    """

    folder: Path
    label: str
    problem: str
    state: str = "unreadable"

    @property
    def fingerprint(self) -> str:
        """The name of its folder."""
        return self.folder.name


def sweep_rows(root: Path, name: str) -> list[Cell | UnreadableCell]:
    """Return the members of a sweep; those that cannot be read as `UnreadableCell`.

    Raises:
        ConfigError: there is no such sweep.
    """
    rows = members(root, name)
    return [_member(run_folder(root.resolve(), row["fingerprint"]), row) for row in rows]


def sweep_cells(root: Path, name: str) -> list[Cell]:
    """Return the members of a sweep that can be read; the others are named on stderr.

    Raises:
        ConfigError: there is no such sweep.
    """
    rows = sweep_rows(root, name)
    for row in rows:
        if isinstance(row, UnreadableCell):
            print(f"{row.fingerprint} ({row.label}) is left out: {row.problem}", file=sys.stderr)
    return [row for row in rows if isinstance(row, Cell)]


def _member(folder: Path, row: Mapping[str, Any]) -> Cell | UnreadableCell:
    label = row["label"]
    try:
        cell = replace(load_cell(folder), label=label, choices=row.get("choices", {}))
        journal.state(folder)  # it may be damaged as well
        return cell
    except (ConfigError, DataError) as error:  # its first line: several keys may be wrong
        return UnreadableCell(folder, label, str(error).partition("\n")[0])
