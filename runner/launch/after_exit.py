"""After a worker exits: record a crash, retry an out-of-memory at half the micro-batch, give up in the end."""

import signal
import time
from dataclasses import replace

from runner.records import journal
from runner.records.cells import Cell, freeze_cell
from runner.records.failures import MEMORY, cause_of, last_failure
from runner.records.fingerprint import samples_depend_on_each_other

_LEGS = 3
_KILLED_TOO_S = 2.0


def record_crash(cell: Cell, exitcode: int, hung: str | None) -> None:
    """Write `failed` for a process that left no word.

    Whoever kills a whole job kills this process too, a moment later: then SLURM knows, and nothing failed.
    """
    if exitcode == -signal.SIGKILL and hung is None:
        time.sleep(_KILLED_TOO_S)
    tries = journal.attempts(cell.folder)
    if not tries or cell.state != "interrupted":
        return
    if any(e["event"] in journal.TERMINAL for e in journal.events(tries[-1])):
        return
    name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    message = f"the process ended with {name}" + (" and had not finished" if not exitcode else "")
    error = "Hang" if hung else "Crash"
    journal.record_end(cell.folder, "failed", error=error, message=hung or message)


def try_smaller(cell: Cell) -> Cell | None:
    """Return the cell with half the micro-batch where memory was what it lacked, frozen so.

    Tokens per step stay equal: more micro-batches are accumulated. None where another try is
    pointless or not wanted.
    """
    run = cell.config
    if cell.state != "failed" or run.train is None or not run.resources.halve_on_oom:
        return None
    if cause_of(last_failure(cell)) not in MEMORY:
        return None
    share = run.train.batch_size // run.resources.num_processes
    half, odd = divmod(min(share, run.train.micro_batch or share), 2)
    if odd or not half:
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
        "train.micro_batch is not halved: under this model or precision a sample's numbers depend on "
        f"its micro-batch; give more memory, or train.micro_batch={half}, which makes a new cell"
    )
    kept = {k: event[k] for k in ("error", "traceback") if k in event}
    journal.record_end(cell.folder, "failed", message=f"{event.get('message', '')}\n{why}", **kept)


def give_up(cell: Cell) -> bool:
    """Fail a cell whose last attempts all ended without a new checkpoint; True where that is so."""
    last = journal.attempts(cell.folder)[-_LEGS:]
    saved = [e for a in last for e in journal.events(a) if e["event"] == "checkpointed"]
    if len(last) < _LEGS or saved or cell.state != "interrupted":
        return False
    message = f"{_LEGS} attempts ended without a new checkpoint; give it a longer resources.timeout_min, or a smaller train.checkpoint.every_s"
    journal.record_end(cell.folder, "failed", error="NoProgress", message=message)
    return True
