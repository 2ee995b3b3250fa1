"""Real MLflow servers on loopback, with SQLite or Debian's PostgreSQL behind them.

And cells for them: written by hand, or run as a cluster's job runs them.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.runs import Runs
from runner.records import journal
from runner.records.cells import Cell, freeze_cell, join_sweep, make_cells
from tests.command_server import Command, start

_STEPS = 50
POINTS = 3 * _STEPS  # of a cell that `write` writes


class Server:
    """A real `mlflow server` that can be killed and started again.

    Args:
        folder: of its files.
        store: URI of the database; default: SQLite in `folder`.
    """

    def __init__(self, folder: Path, store: str | None = None, workers: int = 1) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.workers = workers
        self.store = store or f"sqlite:///{folder}/server.db"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--workers", str(self.workers), "--port", str(self.port)]
        command += ["--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = subprocess.Popen(
            command,
            env=os.environ | quiet,
            start_new_session=True,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def kill(self) -> None:
        """End the whole process tree at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def missing_postgresql() -> str | None:
    """Return why there can be no PostgreSQL behind a server here, None if there can."""
    if _program("initdb") is None:
        return "PostgreSQL is not installed; `make debian` installs it"
    if importlib.util.find_spec("psycopg2") is None:
        return "psycopg2 is not installed; pip install -e '.[dev]'"
    return None


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Run PostgreSQL on a socket of its own; yield the URI of its database."""
    # It refuses to run as root, and root's folders are closed to others.
    user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="espalier-pg-"))
    if user:
        shutil.chown(folder, **user)
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    options = ["--auth=trust", "--no-sync", "--username=postgres"]
    subprocess.run([_program("initdb"), "-D", folder / "data", *options], check=True, **quiet)
    socket_only = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", folder]
    process = subprocess.Popen([_program("postgres"), "-D", folder / "data", *socket_only], **quiet)
    try:
        deadline = time.monotonic() + 60
        ready = [_program("pg_isready"), "-q", "-h", folder]
        while subprocess.run(ready, check=False).returncode:
            assert process.poll() is None, "PostgreSQL ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql+psycopg2://postgres@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGQUIT)  # it ends at once
        process.wait()
        shutil.rmtree(folder)


def _program(name: str) -> str | None:
    """Return a program of PostgreSQL; Debian keeps them out of PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(debian[-1]) if debian else shutil.which(name)


def assert_equal(folders: Runs, store: Runs) -> None:
    """Assert that both hold the same runs and points; system metrics have no fixed number."""
    assert len(store.table) == len(folders.table)
    key = ["fingerprint", "key", "step"]
    ours, theirs = (
        runs.history[~runs.history["key"].str.startswith("system/")].sort_values(key)
        for runs in (folders, store)
    )
    assert ours[key].to_numpy().tolist() == theirs[key].to_numpy().tolist()
    assert ours["value"].tolist() == pytest.approx(theirs["value"].tolist(), nan_ok=True)


def new_cells(compose: Callable[..., dict[str, Any]], name: str, count: int) -> list[Cell]:
    """Return the frozen cells of a sweep, which differ in their seeds."""
    node = compose(f"name={name}")
    cells = make_cells((f"seed={n}", {**node, "seed": n}) for n in range(count))
    for cell in cells:
        freeze_cell(cell)
    join_sweep(name, cells)
    return cells


def write(cell: Cell, ended: str = "finished") -> None:
    """Write what a worker would; it takes the cell over if an earlier one has left it."""
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    for step in range(_STEPS):
        writer.metrics(step, {"loss": 5.0 / (step + 1), "lr": 1e-3, "tokens": step * 64})
    writer.event(ended)
    writer.close()


def start_job(cell: Cell) -> Command:
    """Start the cell as a cluster's job would: no launcher beside it."""
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    return start("runner.launch.worker", str(cell.folder), env=environment)
