"""MLflow as a view of the run folders: complete and without duplicates, whatever the store does."""

import contextlib
import json
import math
import re
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from analysis.runs import from_folders
from analysis.stores import from_mlflow
from runner.launch.mlflow_process import finish_uploader, start_uploader
from runner.records import journal
from runner.records.cells import freeze_cell, join_sweep, make_cells
from runner.views.mlflow import Uploader, delivered, embedded_uri, refresh_pages, sync
from runner.views.mlflow_cursors import Cursor
from runner.views.mlflow_page import addresses
from runner.views.mlflow_points import PointReader
from runner.views.sweep_story import figure_file, note_story
from tests.command_server import run, start
from tests.mlflow_server import POINTS, assert_equal, new_cells, start_job, write

Run = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., dict[str, Any]]


@pytest.mark.slow
def test_mlflow_gets_everything_once(espalier: Run, tmp_path: Path) -> None:
    done = espalier("-m", "seed=1,2", "name=m", "track.uri=null")
    assert done.returncode == 0, done.stderr
    assert sync(tmp_path, ["m"], None) == 0
    assert delivered(tmp_path / "sweeps" / "m", None)
    for cursor in tmp_path.glob("runs/*/mlflow/*.json"):  # as if noting the delivery had failed
        entries = json.loads(cursor.read_text()) | {"sent": 0, "size": -1}
        cursor.write_text(json.dumps(entries))
    Uploader(tmp_path, None).client.delete_run(entries["run_id"])  # as the UI does
    assert not delivered(tmp_path / "sweeps" / "m", None)
    again = espalier("-m", "seed=1,2", "name=m", "track.uri=null")
    assert "0 to run" in again.stderr  # ... but MLflow gets what it lacks
    assert "was deleted there; it has new results and is made anew" in " ".join(
        again.stderr.split()
    )
    assert sync(tmp_path, ["m"], None) == 0
    assert delivered(tmp_path / "sweeps" / "m", None)
    assert_equal(from_folders(tmp_path, "m"), from_mlflow(embedded_uri(tmp_path), "m"))
    run = Uploader(tmp_path, None).client.search_runs(["1"])[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["precision"] == run.data.tags["precision"] == "fp32"
    assert run.data.params["model.width"] == "24"
    assert run.data.tags["state"] == "finished"
    _check_page(tmp_path)


def _check_page(root: Path) -> None:
    """The page of sweep `m` opens on its measure and tells grid, verdict and figure."""
    note_story(root, "m", {"verdict": "Seeds differ."})
    figure_file(root, "m").write_bytes(b"a picture")
    refresh_pages(root)
    client = Uploader(root, None).client
    page = client.get_experiment("1")
    note = page.tags["mlflow.note.content"]
    assert note.startswith("**2 cells** of `m` by seed\n\n- seed: 1, 2\n")
    assert "**Verdict.** Seeds differ." in note
    shown = re.search(r"get-artifact[?]path=figure.png&run_uuid=(\w+)&", note)
    assert shown is not None
    assert "figure.png" in [file.path for file in client.list_artifacts(shown[1])]
    view = json.loads(page.tags["mlflow.sharedViewState.espalier"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`val_loss`", True)
    assert {"metrics.`val_loss`", "tags.`state`", "params.`seed`"} <= set(view["selectedColumns"])
    sections = {s["uuid"]: (s["name"], s["display"]) for s in view["compareRunSections"]}
    first = view["compareRunCharts"][0]
    assert first["metricKey"] == "val_loss"
    assert sections[first["metricSectionId"]] == ("Results", True)
    assert ("System metrics", False) in sections.values()
    assert len(page.tags["mlflow.sharedViewState.espalier"]) < 5000, "a tag holds 5000 characters"
    (address,) = addresses(root, "http://here", embedded_uri(root))
    runs = "http://here/#/experiments/1/runs?viewStateShareKey=espalier"
    assert address.split() == ["m:", runs, "compare:", f"{runs}&compareRunsMode=CHART"]


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
    return run("runner.commands.cli", "sync", *arguments, "--root", str(root))


@pytest.mark.slow
def test_a_store_of_another_schema_or_locked_is_named_and_rebuilt_with_all_it_had(
    compose: Compose, tmp_path: Path
) -> None:
    cells = [*new_cells(compose, "s", 1), *new_cells(compose, "other", 2)]
    for cell in cells:
        write(cell)
    assert _sync(tmp_path, "s", "other").stdout == f"{3 * POINTS} points delivered\n"
    server = Cursor(cells[0].folder, "s", "http://elsewhere")
    server.write({"run_id": "1" * 32, "sent": 3})
    file = tmp_path / "mlflow" / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as store:
        store.execute("BEGIN EXCLUSIVE")
        Cursor(cells[0].folder, "s", embedded_uri(tmp_path)).file.unlink()
        locked = _sync(tmp_path, "s")
        store.rollback()
        store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        store.commit()
    older = _sync(tmp_path, "s")
    for done, word in ((locked, "locked"), (older, "schema")):
        assert done.returncode != 0
        assert word in done.stderr
        assert "sync" in done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    assert _sync(tmp_path, "s", "--rebuild").stdout == f"{3 * POINTS} points delivered\n"
    for name in ("s", "other"):
        assert_equal(from_folders(tmp_path, name), from_mlflow(embedded_uri(tmp_path), name))
    assert server.read()["sent"] == 3


@pytest.mark.slow
def test_two_sweeps_of_a_root_upload_side_by_side_and_a_rebuild_waits_for_both(
    tmp_path: Path, compose: Compose
) -> None:
    names, uploaders = ("first", "second"), []
    for name in names:
        (cell,) = new_cells(partial(compose, "track.uri=null"), name, 1)
        write(cell)
        uploaders.append(start_uploader(cell.config))
    for name in names:  # while both are open
        _wait_until(lambda name=name: delivered(tmp_path / "sweeps" / name, None))
    assert finish_uploader(uploaders[1], 60) == []
    rebuild = start(
        *("runner.commands.cli", "sync", "second", "--rebuild", "--root", str(tmp_path)), keep=True
    )
    _wait_until(lambda: "waiting for sweeps that run" in rebuild.written()[1])
    assert finish_uploader(uploaders[0], 60) == []
    assert rebuild.wait(120) == 0
    for name in names:
        assert_equal(from_folders(tmp_path, name), from_mlflow(embedded_uri(tmp_path), name))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_up_training(compose: Compose) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=_swallow, args=(listener,), daemon=True).start()
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (cell,) = make_cells([("", compose("name=slow", f"track.uri={uri}"))])
        job = start_job(cell)
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


@pytest.mark.slow
def test_64_cells_at_once_reach_the_embedded_store_through_one_writer(
    tmp_path: Path, compose: Compose
) -> None:
    """Three uploaders start on an empty store while cells write: one holds it, the others wait."""
    cells = new_cells(compose, "many", 64)
    uploaders = [
        start("runner.views.upload", "many", "--root", str(tmp_path), keep=True) for _ in range(3)
    ]
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(write, cells))
    for uploader in uploaders:
        _, errors = uploader.communicate(timeout=120)
        assert uploader.returncode == 0, errors
    sync(tmp_path, ["many"], None)
    assert_equal(from_folders(tmp_path, "many"), from_mlflow(embedded_uri(tmp_path), "many"))
