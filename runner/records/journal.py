"""The journal of a run: who holds the cell, the events of each attempt, the metrics.

    attempts/0001/lease.json     made by link(2): one attempt has one holder, also on NFS
    attempts/0001/heartbeat      touched by the holder; its age is read on the file server's clock
    attempts/0001/evaluating     there during an evaluation
    attempts/0001/events.jsonl   started, checkpointed, interrupted, failed, diverged, finished
    attempts/0001/log.txt        stdout and stderr
    metrics.jsonl                append-only; runner/records/metrics.py reads it

docs/run-folder.md is the format's contract.
"""

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NotRequired

import psutil
from typing_extensions import TypedDict

from runner.machine.storage import (
    append_line,
    read_lines,
    truncate_torn_line,
    unfinished_name,
    write_line,
)
from runner.machine.system_errors import write_error
from runner.machine.typed_json import read_record

FINAL = ("finished", "diverged")  # states that no later attempt changes
ENDED = (*FINAL, "failed")  # states in which a launch leaves a cell alone
TERMINAL = (*ENDED, "interrupted")
_BEAT_S, _STALE_S = 15.0, 120.0
_ONE_CTRL_C_S = 1.0
_EVALUATING = "evaluating"
HELD = 76  # exit code of a worker whose cell another worker holds


class _Event(TypedDict):
    event: str
    time: float
    error: NotRequired[str]
    message: NotRequired[str]
    traceback: NotRequired[str]
    slurm: NotRequired[str]


class _Lease(TypedDict):
    host: str
    pid: int
    process_start: float
    job: NotRequired[str]
    restart: NotRequired[str]


def attempts(run: Path) -> list[Path]:
    """Return the folders of all attempts that have a lease, oldest first."""
    leases = (run / "attempts").glob("*/lease.json")
    return sorted(file.parent for file in leases if file.parent.name.isdigit())


def events(attempt: Path) -> list[dict[str, Any]]:
    """Return the events of one attempt.

    Raises:
        DataError: a line is damaged; the message names file and line.
    """
    return read_lines(attempt / "events.jsonl", _Event)


def lease(attempt: Path) -> dict[str, Any]:
    """Return the lease of an attempt: host, pid, process_start; on SLURM also job and restart.

    Raises:
        DataError: lease.json is damaged.
    """
    return read_record(attempt / "lease.json", _Lease)


def state(run: Path) -> str:
    """Return the state: new, running, interrupted, failed, diverged or finished.

    Raises:
        DataError: the journal is damaged; the message names the file.
    """
    tries = attempts(run)
    if not tries:
        return "new"
    seen = [e["event"] for e in events(tries[-1]) if e["event"] in TERMINAL]
    if seen:
        return str(seen[-1])
    return "running" if alive(tries[-1]) else "interrupted"


def alive(attempt: Path) -> bool:
    """Return whether the holder of `attempt` may still run.

    On this host its process decides, elsewhere its heartbeat, among legs of one SLURM job their
    order.
    """
    held = lease(attempt)
    if "job" in held and held["job"] == _job() and held["restart"] != _restart():
        # Both are legs of this job. SLURM gave an earlier leg up before it started a later one, but
        # a lost node may not know of that: to the earlier leg, the later one is the holder.
        return int(held["restart"]) > int(_restart())
    if held["host"] != socket.gethostname():
        return _heartbeat_age_s(attempt) < _STALE_S
    try:
        process = psutil.Process(held["pid"])
        return abs(process.create_time() - held["process_start"]) < 1.0 and is_alive(process)
    except psutil.NoSuchProcess:
        return _is_hidden(held["pid"]) and _heartbeat_age_s(attempt) < _STALE_S


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process of this host runs: one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_hidden(pid: int) -> bool:
    """Return whether a process is there but not shown: another user's, where /proc has hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _restart() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _heartbeat_age_s(attempt: Path) -> float:
    """Return the age of the last heartbeat, by the file server's clock alone."""
    try:
        with tempfile.TemporaryFile(dir=attempt) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except OSError:  # a reader that may not write cannot tell: take the holder for alive
        return 0.0
    beat = attempt / "heartbeat"
    return now - (beat if beat.exists() else attempt / "lease.json").stat().st_mtime


def record_end(run: Path, event: str, **details: Any) -> None:
    """Record `event` as the end of the newest attempt, for a process that is gone."""
    record = {"event": event, "time": time.time(), **details}
    append_line(attempts(run)[-1] / "events.jsonl", record)


def claim(run: Path) -> Path | None:
    """Return a new attempt folder leased to this process, None if another holds the cell."""
    tries = attempts(run)
    if tries and state(run) == "running":
        return None
    number = int(tries[-1].name) + 1 if tries else 1
    folder = run / "attempts" / f"{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    start = psutil.Process().create_time()
    held = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": start}
    if _job() is not None:
        held |= {"job": _job(), "restart": _restart()}
    complete = unfinished_name(folder / "lease.json")
    complete.write_text(json.dumps(held))
    try:
        os.link(complete, folder / "lease.json")
    except FileExistsError:
        return None
    finally:
        complete.unlink()
    return folder


def is_evaluating(run: Path) -> bool:
    """Return whether the newest attempt is in an evaluation, or ended in one."""
    made = attempts(run)
    return bool(made) and (made[-1] / _EVALUATING).exists()


class StopFlag:
    """A request to stop that a signal handler may make.

    Not a threading.Event: its lock is not re-entrant, so a second signal during the handler of the
    first would deadlock.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    def set(self) -> None:
        """Request the stop."""
        if self._since is None:
            self._since = time.monotonic()

    def is_set(self) -> bool:
        """Return whether a stop was requested."""
        return self._since is not None

    def is_old(self) -> bool:
        """Return whether the stop was requested over a second ago.

        One Ctrl-C may come twice: from the terminal, and at once again from a program around this
        one that got it too (uv, timeout, torchrun).
        """
        return self._since is not None and time.monotonic() - self._since > _ONE_CTRL_C_S


class Journal:
    """Writer of one attempt's events and of the run's metrics."""

    def __init__(self, run: Path, attempt: Path) -> None:
        self.run, self.attempt = run, attempt
        self.number = int(attempt.name)
        self.metrics_file = run / "metrics.jsonl"
        truncate_torn_line(self.metrics_file)
        self._metrics = open(self.metrics_file, "ab", buffering=0)  # noqa: SIM115
        self._one_writes = threading.Lock()
        self.step = 0  # of the last metrics; system metrics are logged under it
        self._continues = self.number == 1  # a first attempt has no earlier rows to take back

    def beat(self, stop: StopFlag) -> None:
        """Start the heartbeat, in a thread.

        It sets `stop` when the cell is cancelled and ends the process when the lease is lost.
        """
        threading.Thread(target=self._beat, args=(stop,), daemon=True, name="heartbeat").start()

    def _beat(self, stop: StopFlag) -> None:
        while True:
            if (self.run / "cancel").exists():
                stop.set()
            with suppress(OSError):
                (self.attempt / "heartbeat").touch()
            time.sleep(_BEAT_S)
            if self.superseded():
                os.write(
                    2, b"another worker holds this cell now; exiting, nothing more is written\n"
                )
                os._exit(HELD)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let whoever watches the run expect no step inside the context; see `is_evaluating`."""
        mark = self.attempt / _EVALUATING
        mark.touch()
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def superseded(self) -> bool:
        """True once a newer attempt holds the lease: stop writing."""
        return int(attempts(self.run)[-1].name) > self.number

    def close(self) -> None:
        """Close the metrics file; its lines are unbuffered, so none is pending."""
        self._metrics.close()

    def event(self, name: str, **details: Any) -> None:
        """Append the event `name` with `details` to events.jsonl."""
        record = {"event": name, "time": time.time(), **details}
        append_line(self.attempt / "events.jsonl", record)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` at `step`; non-finite floats are written as NaN and Infinity."""
        if step > 0 and not self._continues:
            self.restored(0)
        self.step = step
        self._write({"step": step, "time": time.time(), "attempt": self.number, **values})

    def restored(self, step: int) -> None:
        """Record that this attempt continues from `step`, which takes back all later rows.

        Without it the first row of a later attempt takes back all rows but those of step 0.
        """
        self._continues = True
        self._write({"restored": step, "time": time.time(), "attempt": self.number})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with self._one_writes:  # the training thread or that of the system metrics
                write_line(self._metrics, self.metrics_file, line)
        except OSError as error:
            raise write_error(self.metrics_file, error) from error
