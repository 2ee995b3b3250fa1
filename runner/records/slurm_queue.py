"""What SLURM knows of a sweep's cells: squeue for those that wait or run, sacct for those that have ended."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from runner.machine.errors import StorageError
from runner.records import journal
from runner.records.cells import Cell


def queued(root: Path, name: str) -> dict[str, str]:
    """Return the fingerprints of a sweep that squeue knows, each with its array task, `123_4`.

    Raises:
        StorageError: the controller does not answer: unknown is not gone.
    """
    files = (root / "sweeps" / name / "submissions").glob("*.json")
    records = [json.loads(file.read_text()) for file in files]
    known: dict[str, list[list[str]]] = {record["job"]: record["tasks"] for record in records}
    if not known:
        return {}
    command = ["squeue", "--me", "-h", "-r", "-o", "%F %K"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StorageError(f"squeue does not answer: {done.stderr.strip()}; try again when it does")
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        job, index = line.split()
        if job in known and index.isdigit():
            found |= {cell: f"{job}_{index}" for cell in known[job][int(index)]}
    return found


def record_lost_cells(root: Path, name: str, cells: list[Cell]) -> dict[str, str] | None:
    """Record what SLURM ended without a word (a lost node, a kill); None where it does not answer.

    A cell in no queue that still counts as running has lost its process: the heartbeat would show
    it two minutes later.
    """
    try:
        waiting = queued(root, name)
    except StorageError:
        return None
    silent = [c for c in cells if c.fingerprint not in waiting and _left_silently(c)]
    jobs = {c.fingerprint: journal.lease(journal.attempts(c.folder)[-1]).get("job") for c in silent}
    ended = _sacct([job for job in jobs.values() if job])
    for cell in silent:
        state = ended.get(jobs[cell.fingerprint] or "", "")
        if state and state not in ("RUNNING", "PENDING", "REQUEUED", "COMPLETING"):
            journal.record_end(cell.folder, "interrupted", slurm=state)
    return waiting


def _left_silently(cell: Cell) -> bool:
    """True where the newest attempt shows no end, or asks to be submitted again: SLURM knows why."""
    if cell.state == "running":
        return True
    tries = journal.attempts(cell.folder)
    return bool(tries) and [e["event"] for e in journal.events(tries[-1])][-1:] == [
        "needs_resubmit"
    ]


def _sacct(jobs: Sequence[str]) -> dict[str, str]:
    """Return the state of raw job ids as accounting knows it by now; it may lag and lack some."""
    if not jobs:
        return {}
    command = ["sacct", "-X", "-n", "-P", "-o", "JobIDRaw,State", "-j", ",".join(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = (line.split("|") for line in done.stdout.splitlines() if "|" in line)
    return {job: state.split()[0] for job, state in rows}
