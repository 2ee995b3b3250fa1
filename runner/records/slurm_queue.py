"""SLURM's view of a sweep's cells: squeue for queued and running jobs, sacct for ended ones."""

import subprocess
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from runner.machine.errors import StorageError
from runner.machine.typed_json import read_record
from runner.records import journal
from runner.records.cells import Cell

SETUP_FAILED = "hydra.launcher.setup ended the job"  # its script writes this
_LATER_S = 30.0  # between an attempt's last sign of life and what a later leg writes


def queued(root: Path, name: str) -> dict[str, str]:
    """Return {fingerprint: array task as 123_4} of the sweep's cells that squeue lists.

    Raises:
        StorageError: squeue does not answer, so it is unknown which cells are queued.
    """
    known = {record["job"]: record["tasks"] for record in submissions(root, name)}
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


class _Submission(TypedDict):
    job: str
    tasks: list[list[str]]
    at_once: NotRequired[int | None]


def submissions(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of a sweep's arrays, oldest first; see docs/run-folder.md."""
    files = (root / "sweeps" / name / "submissions").glob("*.json")
    return [read_record(file, _Submission) for file in sorted(files)]


def at_once(root: Path, name: str, queue: Mapping[str, str]) -> dict[str, int]:
    """Return the most tasks that may run at the same time of each array in `queue`, by job id.

    Args:
        queue: the array task of each queued cell, as `queued` returns them.
    """
    tasks = Counter(task.partition("_")[0] for task in set(queue.values()))
    limits = {record["job"]: record.get("at_once") for record in submissions(root, name)}
    return {job: min(count, limits.get(job) or count) for job, count in tasks.items()}


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


def log_without_worker(cell: Cell, queue: Collection[str] = ()) -> Path | None:
    """Return the log of a cell's newest job leg if that ended before its worker started, else None.

    The setup failed, for example, or srun did: no attempt knows of it.

    Args:
        queue: the fingerprints of queued cells; their jobs may still start it.
    """
    if cell.fingerprint in queue or cell.state not in ("new", "interrupted"):
        return None
    folder = cell.sweep / "submissions"
    tasks = [
        (folder / f"{int(record['job']):08d}.json", f"{record['job']}_{index}")
        for record in submissions(cell.folder.parent.parent, cell.sweep.name)
        for index, names in enumerate(record["tasks"])
        if cell.fingerprint in names
    ]
    if not tasks:
        return None
    submitted, task = tasks[-1]
    log = folder / f"{task}_0_log.out"
    if not log.exists():
        return None
    tries = journal.attempts(cell.folder)
    begun = (tries[-1] / "lease.json").stat().st_mtime if tries else 0.0
    if begun < submitted.stat().st_mtime:
        return log
    last_sign = max(file.stat().st_mtime for file in tries[-1].iterdir())
    return log if log.stat().st_mtime > last_sign + _LATER_S else None
