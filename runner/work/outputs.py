"""The files in outputs/ that a kind of work writes for other runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner.machine.storage import append_line, read_lines, truncate_torn_line, write_atomically
from runner.records.inputs import sha256
from runner.records.journal import Journal


def write_output(run: Path, name: str, text: str, journal: Journal) -> Path:
    """Write `text` to outputs/`name` of a run and its sha256 to the journal; return the file."""
    file = run / "outputs" / name
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, text)
    note_output(file, journal)
    return file


def note_output(file: Path, journal: Journal) -> None:
    """Record the sha256 and the size of a finished output in the journal."""
    journal.event("wrote", output=file.name, sha256=sha256(file), bytes=file.stat().st_size)


def write_in_batches(
    run: Path,
    name: str,
    journal: Journal,
    stop: Callable[[], bool],
    *,
    total: int,
    size: int,
    batch: Callable[[int], Sequence[dict[str, Any]]],
    measured: Callable[[Sequence[dict[str, Any]]], dict[str, float]],
) -> list[dict[str, Any]] | None:
    """Write `total` rows to outputs/`name`, `size` at a time; return them, None if `stop` came.

    A later attempt goes on after the last row. It makes the interrupted batch again in full: the
    rows of a batch change each other's last bits.

    Args:
        batch: returns the rows of a batch, given its number.
        measured: returns the metrics to log after a batch, given all rows so far.
    """
    file = run / "outputs" / name
    partial = file.with_name(f".{file.name}")
    file.parent.mkdir(exist_ok=True)
    truncate_torn_line(partial)
    rows = list(read_lines(partial))
    if journal.number > 1:
        journal.restored(len(rows))
    while len(rows) < total:
        if stop():
            journal.event("checkpointed", step=len(rows))
            return None
        for row in batch(len(rows) // size)[len(rows) % size :]:
            append_line(partial, row)
            rows.append(row)
        journal.metrics(len(rows), measured(rows))
    partial.rename(file)
    note_output(file, journal)
    return rows
