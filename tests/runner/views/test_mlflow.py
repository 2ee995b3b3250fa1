"""MLflow as a view of the run folders: complete and without duplicates, whatever the store does."""

import contextlib
import json
import math
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from analysis.runs import Runs, from_folders
from analysis.stores import from_mlflow
from runner.machine.errors import StorageError
from runner.records import journal
from runner.records.cells import Cell, freeze_cell, join_sweep, make_cells
from runner.views.mlflow import Uploader, delivered, embedded_uri, sync
from runner.views.mlflow_points import PointReader
from tests.command_server import Command, run, start

Run = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., dict[str, Any]]


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


@pytest.mark.slow
def test_mlflow_gets_everything_once(espalier: Run, tmp_path: Path) -> None:
    done = espalier("-m", "seed=1,2", "name=m", "track.uri=null")
    assert done.returncode == 0, done.stderr
    assert sync(tmp_path, ["m"], None) == 0
    assert delivered(tmp_path / "sweeps" / "m", None)
    for cursor in tmp_path.glob("runs/*/mlflow/*.json"):  # as if noting the delivery had failed
        cursor.write_text(json.dumps(json.loads(cursor.read_text()) | {"sent": 0, "size": -1}))
    assert not delivered(tmp_path / "sweeps" / "m", None)
    again = espalier("-m", "seed=1,2", "name=m", "track.uri=null")
    assert "0 to run" in again.stderr  # ... but MLflow gets what it lacks
    assert sync(tmp_path, ["m"], None) == 0
    assert delivered(tmp_path / "sweeps" / "m", None)
    assert_equal(from_folders(tmp_path, "m"), from_mlflow(embedded_uri(tmp_path), "m"))
    run = Uploader(tmp_path, None).client.search_runs(["1"])[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "24"


def test_points_past_a_restored_step_are_delivered_once(tmp_path: Path) -> None:
    parts = [
        '{"step": 1, "time": 1.0, "loss": 5.0}\n'
        '{"step": 2, "time": 2.0, "loss": 4.0, "mfu": 0.5}\n',
        '{"restored": 1, "time": 3.0, "attempt": 2}\n'
        '{"step": 2, "time": 3.5, "attempt": 1, "loss": 9.0}\n'  # a worker that was taken for dead
        '{"step": 2, "time": 4.0, "attempt": 2, "loss": 4.5, "mfu": 0.4}\n',
        '{"step": 3, "time": 5.0, "attempt": 2, "loss": 3.0}\n{"step": 4, "ti',
    ]
    reader, sent, superseded = PointReader(tmp_path), [], []
    for part in parts:
        with open(tmp_path / "metrics.jsonl", "a") as stream:
            stream.write(part)
        reader.read()
        points, past, end = reader.next_batch()
        reader.mark_delivered(end, past)
        sent.append([(key, step, value) for key, step, _, value in points])
        superseded.append(reader.superseded())
    assert sent == [[("loss", 1, 5.0), ("loss", 2, 4.0), ("mfu", 2, 0.5)], [], [("loss", 3, 3.0)]]
    assert superseded == [0, 1, 1]  # mfu differs by nature


def test_infinities_and_nans_survive_the_store(tmp_path: Path, compose: Compose) -> None:
    (cell,) = make_cells([("", compose("name=n"))])
    freeze_cell(cell)
    join_sweep("n", [cell])
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    for step, value in enumerate((1.0, math.inf, -math.inf, math.nan)):
        writer.metrics(step, {"loss": value})
    writer.event("diverged")
    writer.close()
    assert sync(tmp_path, ["n"], None) == 4
    store = from_mlflow(embedded_uri(tmp_path), "n")
    assert_equal(from_folders(tmp_path, "n"), store)
    assert math.isinf(store.history["value"].max())
    assert store.history["value"].isna().sum() == 1
    run = Uploader(tmp_path, None).client.search_runs(["1"])[0]
    assert (run.info.status, run.data.tags["diverged"]) == ("FAILED", "true")


def _sync(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("runner.commands.cli", "sync", "s", "--root", str(root), *arguments)


@pytest.mark.slow
def test_a_store_of_another_schema_or_locked_is_named(espalier: Run, tmp_path: Path) -> None:
    assert espalier("name=s").returncode == 0
    assert _sync(tmp_path).returncode == 0
    file = tmp_path / "mlflow" / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as store:
        store.execute("BEGIN EXCLUSIVE")
        for cursor in tmp_path.glob("runs/*/mlflow/*.json"):
            cursor.unlink()
        locked = _sync(tmp_path)
        store.rollback()
        store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        store.commit()
    older = _sync(tmp_path)
    for done, word in ((locked, "locked"), (older, "schema")):
        assert done.returncode != 0
        assert word in done.stderr
        assert "sync" in done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    assert _sync(tmp_path, "--rebuild").returncode == 0
    assert_equal(from_folders(tmp_path, "s"), from_mlflow(embedded_uri(tmp_path), "s"))


class Server:
    """A real `mlflow server` on loopback that can be killed and started again."""

    def __init__(self, folder: Path, workers: int = 1) -> None:
        self.workers = workers
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--workers",
            str(self.workers),
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--port",
            str(self.port),
        ]
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    made = Server(tmp_path / "server")
    made.start()
    yield made
    made.kill()


def _job(cell: Cell) -> Command:
    """Start the cell as a cluster's job would: no launcher beside it."""
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    return start("runner.launch.worker", str(cell.folder), env=environment)


@pytest.mark.slow
def test_a_server_killed_half_way_loses_nothing(
    server: Server, compose: Compose, tmp_path: Path
) -> None:
    overrides = [
        "name=k",
        f"track.uri={server.uri}",
        "train.steps=6000",
        "eval.every=3000",
        "train.log_every=20",
    ]
    (cell,) = make_cells([("", compose(*overrides))])
    job = _job(cell)
    cursor = cell.folder / "mlflow"
    deadline = time.monotonic() + 120
    while not any(json.loads(f.read_text())["sent"] for f in cursor.glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.kill()
    assert job.poll() is None, "the run ended before the server did; give it more steps"
    assert job.wait(timeout=120) == 0
    assert cell.state == "finished"
    with pytest.raises(StorageError, match="espalier sync"):
        sync(tmp_path, ["k"], server.uri)
    server.start()
    assert sync(tmp_path, ["k"], server.uri) > 0
    assert sync(tmp_path, ["k"], server.uri) == 0
    assert_equal(from_folders(tmp_path, "k"), from_mlflow(server.uri, "k"))
    client = Uploader(tmp_path, server.uri).client
    (run,) = client.search_runs([client.get_experiment_by_name("k").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["fingerprint"] == cell.fingerprint
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names >= {"cell.json", "samples.txt", "checkpoint.txt"}


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_up_training(compose: Compose) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=_swallow, args=(listener,), daemon=True).start()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (cell,) = make_cells([("", compose("name=slow", f"track.uri={uri}"))])
        job = _job(cell)
        deadline = time.monotonic() + 60
        while cell.state != "finished":  # said as soon as training is over, not when MLflow is
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert job.wait(timeout=120) == 0


def _swallow(listener: socket.socket) -> None:
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(listener.accept())


def _sixty_four(tmp_path: Path, compose: Compose) -> list[Cell]:
    """Cells of one sweep, each written by a thread of its own while others read."""
    node = compose("name=many")
    cells = make_cells((f"seed={n}", {**node, "seed": n}) for n in range(64))
    for cell in cells:
        freeze_cell(cell)
    join_sweep("many", cells)
    return cells


def _write(cell: Cell) -> None:
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    for step in range(50):
        writer.metrics(step, {"loss": 5.0 / (step + 1), "lr": 1e-3, "tokens": step * 64})
    writer.event("finished")
    writer.close()


@pytest.mark.slow
def test_64_cells_at_once_reach_the_embedded_store_through_one_writer(
    tmp_path: Path, compose: Compose
) -> None:
    """Three uploaders start on an empty store while cells write: one holds it, the others wait."""
    cells = _sixty_four(tmp_path, compose)
    uploaders = [
        start("runner.views.mlflow", "many", "--root", str(tmp_path), keep=True) for _ in range(3)
    ]
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(_write, cells))
    for uploader in uploaders:
        _, errors = uploader.communicate(timeout=120)
        assert uploader.returncode == 0, errors
    sync(tmp_path, ["many"], None)
    assert_equal(from_folders(tmp_path, "many"), from_mlflow(embedded_uri(tmp_path), "many"))


@pytest.mark.slow
def test_64_cells_feed_a_server_at_once(tmp_path: Path, compose: Compose) -> None:
    """Every cell has an uploader of its own; all start at once on a server without experiments."""
    cells = _sixty_four(tmp_path, compose)
    server = Server(tmp_path)
    server.start()
    try:
        refusals = []

        def run(cell: Cell) -> None:
            _write(cell)
            uploader = Uploader(tmp_path, server.uri)
            # As `upload_until_closed` does: what a slow server did not take is sent again.
            for _ in range(5):
                try:
                    uploader.deliver("many", only=cell.fingerprint)
                    return
                except StorageError as error:
                    refusals.append(str(error))
                    time.sleep(random.uniform(1.0, 10.0))

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(run, cells))
        assert not [r for r in refusals if "locked" in r or "exists" in r]
        assert_equal(from_folders(tmp_path, "many"), from_mlflow(server.uri, "many"))
        client = Uploader(tmp_path, server.uri).client
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert len(runs) == 64
        assert {run.info.status for run in runs} == {"FINISHED"}
    finally:
        server.kill()
