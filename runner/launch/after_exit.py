"""After a worker exits: record how it ended, halve the micro-batch for want of memory, give up.

A cell that was killed from outside is no failure and runs again; it is given up after 3 attempts
without a new checkpoint.
"""

import re
import signal
import time
from dataclasses import replace
from pathlib import Path

from runner.records import journal
from runner.records.cells import Cell, freeze_cell
from runner.records.failures import (
    KILLED,
    MEMORY,
    OUT_OF_HOST_MEMORY,
    cause_of,
    last_failure,
)
from runner.records.fingerprint import samples_depend_on_each_other

_MAX_ATTEMPTS = 3  # without a new checkpoint
_JOB_KILL_S = 2.0  # between the kills of a job's processes
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # of a process, of srun
_RANK_KILLED = re.compile(r"\(SIGKILL\)|error: .*: Killed$", re.MULTILINE)  # torchrun, srun


def record_exit(
    cell: Cell, exitcode: int, output: str, *, stopped: bool, hung: str | None, memory: str | None
) -> None:
    """Record the end of a worker that exited without recording one.

    It is `interrupted` where the launcher had stopped the worker, or where a SIGKILL came from
    outside and nothing says that memory was short; else `failed`. After a SIGKILL it waits: if the
    job was killed as a whole, this process is killed too, and nothing is recorded.

    Args:
        output: what the attempt wrote; torchrun and srun name the signal that ended a rank there.
        stopped: whether the worker was told to end.
        hung: the reason for which the worker was killed here, None if it was not.
        memory: the sign that memory was short, None without one.
    """
    rank_killed = exitcode != 0 and _RANK_KILLED.search(output) is not None
    killed = exitcode in _KILLED or rank_killed
    if killed and not stopped and hung is None:
        time.sleep(_JOB_KILL_S)
    attempts = journal.attempts(cell.folder)
    if not attempts or cell.state in ("running", *journal.FINAL):
        return
    # If one rank is killed, what another records is a consequence.
    if not rank_killed and any(
        e["event"] in journal.TERMINAL for e in journal.events(attempts[-1])
    ):
        return
    name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    message = f"the process ended with {name}" + (" and had not finished" if not exitcode else "")
    event, error = "failed", "Crash"
    if hung is not None:
        error, message = "Hang", hung
    elif stopped:
        event, error, message = "interrupted", "Stopped", f"stopped before it had saved: {message}"
    elif killed and memory is not None:
        error, message = OUT_OF_HOST_MEMORY, f"{message}: {memory}"
    elif killed:
        event, error = "interrupted", KILLED
        message = "killed from outside (SIGKILL); nothing says that memory was short"
    journal.record_end(cell.folder, event, error=error, message=message)


def was_killed(cell: Cell) -> bool:
    """Return whether a SIGKILL from outside ended the newest attempt."""
    attempts = journal.attempts(cell.folder)
    return bool(attempts) and _killed(attempts[-1]) and cell.state == "interrupted"


def _killed(attempt: Path) -> bool:
    return any(event.get("error") == KILLED for event in journal.events(attempt))


def halve_micro_batch(cell: Cell) -> Cell | None:
    """Freeze and return a cell that ran out of memory with half its micro-batch.

    Tokens per step stay equal: more micro-batches are accumulated. Return None if the cell failed
    otherwise, resources.halve_on_oom is off, or the micro-batch cannot be halved.
    """
    run = cell.config
    if cell.state != "failed" or run.train is None or not run.resources.halve_on_oom:
        return None
    if cause_of(last_failure(cell)) not in MEMORY:
        return None
    half, remainder = divmod(run.train.forward_samples(run.resources.num_processes), 2)
    if remainder or not half:
        return None
    if samples_depend_on_each_other(run):
        _explain_no_halving(cell, half)
        return None
    smaller = replace(cell, config=replace(run, train=replace(run.train, micro_batch=half)))
    freeze_cell(smaller, overwrite=True)
    return smaller


def _explain_no_halving(cell: Cell, half: int) -> None:
    event = last_failure(cell)
    why = (
        "train.micro_batch is not halved: under this model or precision a sample's numbers depend "
        f"on its micro-batch; give more memory, or train.micro_batch={half}, which makes a new cell"
    )
    cause = {k: event[k] for k in ("error", "traceback") if k in event}
    message = f"{event.get('message', '')}\n{why}"
    journal.record_end(cell.folder, "failed", message=message, **cause)


def give_up(cell: Cell) -> bool:
    """Return whether the last attempts all ended without a new checkpoint; then record `failed`."""
    last = journal.attempts(cell.folder)[-_MAX_ATTEMPTS:]
    saved = [e for a in last for e in journal.events(a) if e["event"] == "checkpointed"]
    if len(last) < _MAX_ATTEMPTS or saved or cell.state != "interrupted":
        return False
    error, cure = "NoProgress", "a longer resources.timeout_min"
    if all(_killed(attempt) for attempt in last):
        error, cure = KILLED, "a machine where nothing sends it SIGKILL"
    message = (
        f"{_MAX_ATTEMPTS} attempts ended without a new checkpoint; give it {cure}, "
        "or a smaller train.checkpoint.every_s"
    )
    journal.record_end(cell.folder, "failed", error=error, message=message)
    return True
