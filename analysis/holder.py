"""Whether the worker that holds a cell may still run, by what docs/run-folder.md says of it."""

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import psutil

_STALE_S = 120.0


def alive(attempt: Path, lease: dict[str, Any]) -> bool:
    """True where the holder of `attempt` may run: by its process on this host, by its heartbeat elsewhere.

    Args:
        lease: the content of the attempt's lease.json.
    """
    if lease["host"] != socket.gethostname():
        return _heartbeat_age_s(attempt) < _STALE_S
    try:
        return bool(abs(psutil.Process(lease["pid"]).create_time() - lease["process_start"]) < 1.0)
    except psutil.NoSuchProcess:
        return False


def _heartbeat_age_s(attempt: Path) -> float:
    """Return the age of the last sign of life; both times are the file server's."""
    try:
        with tempfile.TemporaryFile(dir=attempt) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except OSError:  # without the right to write there is no telling
        return 0.0
    beat = attempt / "heartbeat"
    return now - (beat if beat.exists() else attempt / "lease.json").stat().st_mtime
