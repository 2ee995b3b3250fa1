"""Whether the worker that holds a cell is alive, by the rules of docs/run-folder.md."""

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import psutil

_STALE_S = 120.0


def alive(attempt: Path, lease: dict[str, Any]) -> bool:
    """Return whether the holder of `attempt` may still run.

    On this host its process decides, elsewhere its heartbeat.

    Args:
        lease: the content of the attempt's lease.json.
    """
    if lease["host"] != socket.gethostname():
        return _heartbeat_age_s(attempt) < _STALE_S
    try:
        process = psutil.Process(lease["pid"])
        began = abs(process.create_time() - lease["process_start"]) < 1.0
        return bool(began and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return _is_hidden(lease["pid"]) and _heartbeat_age_s(attempt) < _STALE_S


def _is_hidden(pid: int) -> bool:
    """Return whether a process is there but not shown: another user's, where /proc has hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False


def _heartbeat_age_s(attempt: Path) -> float:
    """Return the age of the heartbeat, else of the lease, by the file server's clock."""
    try:
        with tempfile.TemporaryFile(dir=attempt) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except OSError:  # no right to write: the age is unknown, the holder counts as alive
        return 0.0
    beat = attempt / "heartbeat"
    return now - (beat if beat.exists() else attempt / "lease.json").stat().st_mtime
