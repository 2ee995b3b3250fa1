"""Drift: a finished run that would come out otherwise today, of the same config."""

from collections.abc import Sequence
from pathlib import Path

from runner.machine import environment
from runner.records.cells import Cell
from runner.records.inputs import changed_inputs


def drift(run: Path) -> str | None:
    """Return how what `run` has read of its inputs, or the code or torch it finished with, has changed; None: not."""
    changed = changed_inputs(run)
    return f"input {'; '.join(changed)}" if changed else environment.drift(run)


def drifted(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each reason for which finished cells of `cells` have drifted."""
    reasons: dict[str, list[Cell]] = {}
    for cell in cells:
        reason = drift(cell.folder) if cell.state == "finished" else None
        if reason is not None:
            reasons.setdefault(reason, []).append(cell)
    return [
        f"{len(group)} finished cells are kept but drifted, {group[0].fingerprint[:6]}: {reason}"
        for reason, group in reasons.items()
    ]
