"""After a worker exits: record a crash, retry an out-of-memory at half the micro-batch, give up.

A cell is given up after 3 attempts without a new checkpoint.
"""

import signal
import time
from dataclasses import replace

from runner.records import journal
from runner.records.cells import Cell, freeze_cell
from runner.records.failures import MEMORY, cause_of, last_failure
from runner.records.fingerprint import samples_depend_on_each_other

_MAX_ATTEMPTS = 3  # without a new checkpoint
_JOB_KILL_S = 2.0  # between the kills of a job's processes


def record_crash(cell: Cell, exitcode: int, hung: str | None) -> None:
    """Record `failed` for a worker that exited without recording an end.

    After a SIGKILL it waits: if the job was killed as a whole, this process is killed too, and the
    cell has not failed.

    Args:
        hung: the reason for which the worker was killed here, None if it was not.
    """
    if exitcode == -signal.SIGKILL and hung is None:
        time.sleep(_JOB_KILL_S)
    attempts = journal.attempts(cell.folder)
    if not attempts or cell.state != "interrupted":
        return
    if any(e["event"] in journal.TERMINAL for e in journal.events(attempts[-1])):
        return
    name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    message = f"the process ended with {name}" + (" and had not finished" if not exitcode else "")
    error = "Hang" if hung else "Crash"
    journal.record_end(cell.folder, "failed", error=error, message=hung or message)


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
    message = (
        f"{_MAX_ATTEMPTS} attempts ended without a new checkpoint; give it a longer "
        "resources.timeout_min, or a smaller train.checkpoint.every_s"
    )
    journal.record_end(cell.folder, "failed", error="NoProgress", message=message)
    return True
