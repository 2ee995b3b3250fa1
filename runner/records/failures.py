"""Failed cells grouped by cause, with the keys that a group has in common.

For example: "14 of 60: gpu memory, all model.width=1024 precision.compute=bf16".
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.records import journal
from runner.records.cells import Cell
from runner.records.config import flatten, freeze
from runner.records.slurm_queue import SETUP_FAILED, log_without_worker

# First match wins: (class, pattern of "error: message").
KILLED, OUT_OF_HOST_MEMORY = "Killed", "OutOfHostMemory"  # errors that a launcher records
_GPU = r"OutOfMemoryError:|(?i:cuda)[^\n]*out of memory|CU\w+_STATUS_ALLOC_FAILED"
_HOST = rf"^(\w*MemoryError|{OUT_OF_HOST_MEMORY}):|an(no|')t allocate memory|std::bad_alloc"
_CLASSES = (
    ("gpu memory", re.compile(_GPU)),
    ("host memory", re.compile(_HOST)),
    ("killed", re.compile(rf"^{KILLED}:|ended with SIGKILL$")),
    ("disk", re.compile(r"StorageError|No space left|Read-only file system")),
    ("data", re.compile(r"DataError")),
    ("config", re.compile(r"ConfigError|CheckpointError")),
    ("hang", re.compile(r"^Hang:")),
    ("no progress", re.compile(r"^NoProgress:")),
    ("crash", re.compile(r"^Crash:")),
)
MEMORY = ("gpu memory", "host memory")
CLASSES = (*(name for name, _ in _CLASSES), "code")
# The cause for each SLURM state of a job whose cell neither finished nor waits in the queue.
_ENDED_BY_SLURM = {
    "TIMEOUT": "time limit",
    "NODE_FAIL": "node",
    "PREEMPTED": "preemption",
    "OUT_OF_MEMORY": "host memory",
    "CANCELLED": "cancelled",
}
# The cause of a leg that ended before its worker started, by how a line of its log begins.
_BEFORE_START = {"setup": (SETUP_FAILED,), "srun": ("srun: ", "slurmstepd: ")}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')


@dataclass(frozen=True)
class Cluster:
    """Failed cells with one cause.

    Args:
        cause: one of CLASSES, "divergence", or the cause of a SLURM state.
        message: the error's first line.
        where: the innermost traceback frame outside installed packages, "" if there is none.
        cells: the cells of the group.
        shared: keys and values that all these cells have and not all cells of the sweep.
    """

    cause: str
    message: str
    where: str
    cells: tuple[Cell, ...]
    shared: dict[str, Any]

    def describe(self, of: int) -> str:
        """Return two lines, cause and message, for a sweep of `of` cells."""
        common = " ".join(f"{key}={value}" for key, value in self.shared.items())
        tail = f", all {common}" if common else ""
        where = f" ({self.where})" if self.where else ""
        return f"{len(self.cells)} of {of}: {self.cause}{tail}\n  {self.message}{where}"


def cause_of(event: dict[str, Any]) -> str:
    """Return the cause of a `failed` event, one of CLASSES."""
    text = f"{event.get('error', '')}: {event.get('message', '')}"
    return next((name for name, pattern in _CLASSES if pattern.search(text)), "code")


def signature(event: dict[str, Any]) -> tuple[str, str, str]:
    """Return (cause, exception type, innermost frame); equal for failures that count as alike.

    Where nothing was raised (a crash, a hang), the message stands for the exception.
    """
    if "traceback" not in event:
        return cause_of(event), str(event.get("message", "")), ""
    return cause_of(event), event.get("error", ""), _frame(event["traceback"])


def last_failure(cell: Cell) -> dict[str, Any]:
    """Return the last `failed` event of a cell whose newest attempt failed."""
    tries = journal.attempts(cell.folder)
    return next(e for e in reversed(journal.events(tries[-1])) if e["event"] == "failed")


def clusters(cells: Sequence[Cell], queue: Collection[str] = ()) -> list[Cluster]:
    """Return the failed, diverged and SLURM-ended cells, grouped by `signature`, largest first.

    SLURM-ended are those whose job ended without being submitted again, before or after its worker
    started.

    Args:
        queue: the fingerprints of queued cells.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    messages: dict[tuple[str, str, str], str] = {}
    for cell in cells:
        cause = _cause(cell, queue)
        if cause is not None:
            key, message = cause
            groups.setdefault(key, []).append(cell)
            messages.setdefault(key, message)
    unsorted = [
        Cluster(key[0], messages[key], key[2], tuple(group), _shared(group, cells))
        for key, group in groups.items()
    ]
    return sorted(unsorted, key=lambda c: -len(c.cells))


def why_no_worker(log: Path) -> tuple[str, str]:
    """Return (cause, message) of a job leg that ended before its worker started, by its log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    cause, said = "no worker", lines[-1] if lines else "it wrote nothing"
    for name, beginning in _BEFORE_START.items():
        known = [line for line in lines if line.startswith(beginning)]
        if known:
            cause, said = name, known[-1]
            break
    return cause, f"{said} (before a worker started: {log}); the same command submits it again"


def _cause(cell: Cell, queue: Collection[str]) -> tuple[tuple[str, str, str], str] | None:
    state = cell.state
    log = log_without_worker(cell, queue)
    if log is not None:
        cause, message = why_no_worker(log)
        return (cause, message.partition(" (before")[0], ""), message
    if state == "failed":
        event = last_failure(cell)
        return signature(event), str(event.get("message", "")).strip().partition("\n")[0]
    if state == "diverged":
        return ("divergence", "", ""), "a result, not retried: see train.diverged_nats"
    if state != "interrupted":
        return None
    events = journal.events(journal.attempts(cell.folder)[-1])
    killed = [event["message"] for event in events if event.get("error") == KILLED]
    if killed:
        return ("killed", "", ""), f"{killed[-1]}; the same command goes on"
    states = [event["slurm"] for event in events if "slurm" in event]
    if not states:
        return None
    cause = _ENDED_BY_SLURM.get(states[-1], "unknown")
    return (cause, states[-1], ""), f"SLURM: {states[-1]}; the same command submits it again"


def _frame(traceback: str) -> str:
    own = [m for m in _FRAME.finditer(traceback) if "site-packages" not in m["file"]]
    if not own:
        return ""
    last = own[-1]
    return f"{'/'.join(last['file'].split('/')[-2:])}:{last['line']} in {last['name']}"


def _shared(group: Sequence[Cell], everyone: Sequence[Cell]) -> dict[str, Any]:
    keys = [_keys(cell) for cell in group]
    common = {k: v for k, v in keys[0].items() if all(other.get(k) == v for other in keys)}
    others = [_keys(cell) for cell in everyone]
    return {k: v for k, v in common.items() if any(other.get(k) != v for other in others)}


def _keys(cell: Cell) -> dict[str, Any]:
    return {k: v for k, v in flatten(freeze(cell.config)).items() if not isinstance(v, list)}
