"""Drift: a finished run of the same config might come out differently today.

Each attempt notes the code that the classes of its config reach, attempts/<n>/code.json. Attempts
of releases that did not note it are compared by their commit.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.moves import current_path
from runner.machine import code, environment, storage
from runner.machine.errors import DataError
from runner.machine.typed_json import read_record
from runner.records import journal
from runner.records.cells import Cell
from runner.records.config import SETTINGS, freeze
from runner.records.inputs import changed_inputs

_FILE = "code.json"
_NOTE = dict[str, str]  # hashes by the name of a module
_SHOWN = 3  # modules named in a line


def drift(run: Path) -> str | None:
    """Return what changed since `run` finished (input files, torch, code), None if nothing.

    A note that cannot be read is such a change: what the run was is then unknown.
    """
    try:
        return _drift(run)
    except DataError as error:
        return str(error)


def _drift(run: Path) -> str | None:
    inputs = changed_inputs(run)
    if inputs:
        return f"input {'; '.join(inputs)}"
    notes = _notes(run)
    return environment.torch_drift(run) or (
        _changed(run, notes[-1]) if notes else environment.commit_drift(run)
    )


def drifted(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each reason of drift among those of `cells` that have a result.

    A cell whose journal cannot be read is left out: whoever shows its state says why.
    """
    reasons: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        with suppress(DataError):
            state = cell.state
            reason = drift(cell.folder) if state in journal.FINAL else None
            if reason is not None:
                reasons.setdefault((state, reason), []).append(cell)
    return [
        f"{len(group)} {state} cells are kept but drifted, {group[0].fingerprint[:6]}: {reason}"
        for (state, reason), group in reasons.items()
    ]


def note_code(attempt: Path, cell: Cell) -> str | None:
    """Write code.json of `attempt`; return what differs from the first one of `cell`, if anything.

    The modules are those of the classes that the config names and of all that these import.
    """
    nodes = [node for key, node in freeze(cell.config).items() if key not in SETTINGS]
    names = map(current_path, _names(nodes))
    now = code.hashes({name.rpartition(".")[0] for name in names})
    storage.write_atomically(attempt / _FILE, json.dumps(now, indent=1))
    first = _notes(cell.folder)[0]
    # What is edited while the first attempt starts is not what it runs.
    modules = code.changed(read_record(first, _NOTE)) if first.parent != attempt else []
    return f"code: {_listed(modules)} edited since the first attempt" if modules else None


def _notes(run: Path) -> list[Path]:
    return sorted(run.glob(f"attempts/*/{_FILE}"))


def _changed(run: Path, note: Path) -> str | None:
    modules = code.changed(read_record(note, _NOTE))
    if not modules:
        return None
    then, now = environment.last_record(run).get("git_sha", ""), environment.revision()
    edits = " with uncommitted edits" if now["git_diff"] else ""
    between = f" ({then[:9]} ran, {now['git_sha'][:9]}{edits} stands now)" if then else ""
    return (
        f"{_listed(modules)} edited since{between}; the results are those of the old code. If "
        "numbers change, raise the `numerics` of the config class, which makes new cells; to run "
        "only these again, delete their folders"
    )


def _listed(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return ", ".join(modules[:_SHOWN]) + more


def _names(node: Any) -> Iterator[str]:
    """Yield each `_target_` within a frozen config."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from _names(part)
