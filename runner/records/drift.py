"""Drift: a finished run of the same config might come out differently today."""

from collections.abc import Sequence
from pathlib import Path

from runner.machine import environment
from runner.records.cells import Cell
from runner.records.inputs import changed_inputs


def drift(run: Path) -> str | None:
    """Return what changed since `run` finished (input files, commit, torch), None if nothing."""
    changed = changed_inputs(run)
    return f"input {'; '.join(changed)}" if changed else environment.drift(run)


def drifted(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each reason of drift among the finished cells of `cells`."""
    reasons: dict[str, list[Cell]] = {}
    for cell in cells:
        reason = drift(cell.folder) if cell.state == "finished" else None
        if reason is not None:
            reasons.setdefault(reason, []).append(cell)
    return [
        f"{len(group)} finished cells are kept but drifted, {group[0].fingerprint[:6]}: {reason}"
        for reason, group in reasons.items()
    ]
