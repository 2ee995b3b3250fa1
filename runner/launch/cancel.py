"""Cancels cells: keeps them from starting, and makes running ones save and stop, on any host.

The `cancel` file in a run folder does both: launchers do not start the cell, and its worker sees
the file at its next heartbeat. A worker on this host gets a signal too, and an array task without
other cells is cancelled in SLURM.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from runner.records import journal
from runner.records.cells import Cell


def cancel(cells: Sequence[Cell], tasks: Mapping[str, str]) -> Iterator[str]:
    """Cancel `cells` and yield a line for each.

    Args:
        tasks: the array task of each queued cell by fingerprint.
    """
    open_cells = [c for c in cells if c.state in ("new", "interrupted", "running")]
    for cell in open_cells:
        cell.cancelled.touch()
    chosen = {cell.fingerprint for cell in open_cells}
    others = {task for fingerprint, task in tasks.items() if fingerprint not in chosen}
    for cell in cells:
        task = tasks.get(cell.fingerprint)
        outcome = _stop(cell, None if task in others else task)
        yield f"{cell.fingerprint[:6]} {cell.label}: {outcome}"


def _stop(cell: Cell, task: str | None) -> str:
    state = cell.state
    if state not in ("new", "interrupted", "running"):
        return f"{state}, left as it is"
    if task is not None:
        done = subprocess.run(["scancel", task], capture_output=True, text=True, check=False)
        return f"scancel {task}: {done.stderr.strip() or 'sent'}"
    if state != "running":
        return "will not start"
    lease = journal.lease(journal.attempts(cell.folder)[-1])
    if lease["host"] == socket.gethostname():
        with suppress(PermissionError, ProcessLookupError):  # another user's sees the file
            os.kill(lease["pid"], signal.SIGTERM)
    return "asked to save and stop"
