"""The files in outputs/ that a kind of work writes for other runs."""

from pathlib import Path

from runner.machine.storage import write_atomically
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
