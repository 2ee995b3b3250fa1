"""SLURM's view of a sweep's cells: squeue for queued and running jobs, sacct for ended ones."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from runner.machine.errors import StorageError
from runner.records import journal
from runner.records.cells import Cell


def queued(root: Path, name: str) -> dict[str, str]:
    """Return {fingerprint: array task as 123_4} of the sweep's cells that squeue lists.

    Raises:
        StorageError: squeue does not answer, so it is unknown which cells are queued.
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
    queue: dict[str, str] = {}
    for line in done.stdout.splitlines():
        job, index = line.split()
        if job in known and index.isdigit():
            queue |= {cell: f"{job}_{index}" for cell in known[job][int(index)]}
    return queue


def record_lost_cells(root: Path, name: str, cells: list[Cell]) -> dict[str, str] | None:
    """Record the end of cells whose job SLURM ended before they could (a lost node, a kill).

    Without it the missing heartbeat would show the end two minutes later.

    Returns:
        What `queued` returns, None if squeue does not answer.
    """
    try:
        waiting = queued(root, name)
    except StorageError:
        return None
    silent = [c for c in cells if c.fingerprint not in waiting and _has_no_recorded_end(c)]
    jobs = {c.fingerprint: journal.lease(journal.attempts(c.folder)[-1]).get("job") for c in silent}
    ended = _sacct([job for job in jobs.values() if job])
    for cell in silent:
        state = ended.get(jobs[cell.fingerprint] or "", "")
        if state and state not in ("RUNNING", "PENDING", "REQUEUED", "COMPLETING"):
            journal.record_end(cell.folder, "interrupted", slurm=state)
    return waiting


def _has_no_recorded_end(cell: Cell) -> bool:
    """Return whether the newest attempt records no end, or asks to be submitted again."""
    if cell.state == "running":
        return True
    tries = journal.attempts(cell.folder)
    return bool(tries) and [e["event"] for e in journal.events(tries[-1])][-1:] == [
        "needs_resubmit"
    ]


def _sacct(jobs: Sequence[str]) -> dict[str, str]:
    """Return {raw job id: state} from sacct, which may lag and lack some jobs."""
    if not jobs:
        return {}
    command = ["sacct", "-X", "-n", "-P", "-o", "JobIDRaw,State", "-j", ",".join(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = (line.split("|") for line in done.stdout.splitlines() if "|" in line)
    return {job: state.split()[0] for job, state in rows}
