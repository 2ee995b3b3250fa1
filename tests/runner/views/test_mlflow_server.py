"""MLflow servers: one run a cell whoever uploads it, through outages and deletions in the UI."""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from analysis.runs import from_folders
from analysis.stores import from_mlflow
from runner.machine.errors import StorageError
from runner.records import journal
from runner.records.cells import Cell, add_members, make_cells
from runner.views.mlflow import Uploader, sync
from runner.views.mlflow_cursors import Cursor
from tests.command_server import run, start
from tests.conftest import TINY
from tests.mlflow_server import (
    POINTS,
    Server,
    assert_equal,
    missing_postgresql,
    new_cells,
    postgresql,
    start_job,
    write,
)

pytestmark = pytest.mark.slow
Compose = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server for each kind of database: its start takes longer than a test."""
    folder = tmp_path_factory.mktemp("server")
    if request.param == "sqlite":
        made = Server(folder)
        made.start()
        yield made
        made.kill()
        return
    reason = missing_postgresql()
    if reason is not None:
        pytest.skip(reason)
    with postgresql() as store:
        made = Server(folder, store)
        made.start()
        yield made
        made.kill()


def _runs(root: Path, server: Server, name: str) -> list[Any]:
    client = Uploader(root, server.uri).client
    return client.search_runs([client.get_experiment_by_name(name).experiment_id])


def test_two_launches_at_once_make_one_run_a_cell(
    server: Server, text: Path, tmp_path: Path
) -> None:
    """And so does a launch inside an allocation, whose workers think that nobody uploads."""
    name = f"two-{server.port}"
    overrides = [f"data.sources.0.path={text}", f"root={tmp_path}", f"track.uri={server.uri}"]
    overrides += [f"name={name}", "seed=1,2,3", "hydra.launcher.jobs=2"]
    allocation = os.environ | {"SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}
    launches = [
        start("runner", "-m", *TINY, *overrides, env=allocation, keep=True) for _ in range(2)
    ]
    for launch in launches:
        _, errors = launch.communicate(timeout=240)
        assert launch.returncode == 0, errors
        assert "MLflow has not" not in errors
    runs = _runs(tmp_path, server, name)
    assert [r.info.status for r in runs] == ["FINISHED"] * 3
    assert all(int(r.data.params["num_parameters"]) > 0 for r in runs)
    assert_equal(from_folders(tmp_path, name), from_mlflow(server.uri, name))
    told = run("runner.commands.cli", "sync", name, "--root", str(tmp_path))
    assert told.stdout.startswith("0 points"), told.stderr
    assert not (tmp_path / "mlflow" / "mlflow.db").exists()


def test_uploaders_at_once_send_each_point_to_one_run(
    server: Server, compose: Compose, tmp_path: Path
) -> None:
    name = f"at-once-{server.port}"
    for cell in new_cells(compose, name, 3):
        write(cell)
    uploaders = [Uploader(tmp_path, server.uri) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        sent = list(pool.map(lambda uploader: uploader.deliver(name), uploaders))
    assert sum(sent) == 3 * POINTS
    assert len(_runs(tmp_path, server, name)) == 3
    assert_equal(from_folders(tmp_path, name), from_mlflow(server.uri, name))


def test_a_run_deleted_in_the_ui_is_made_anew_and_holds_up_no_other(
    server: Server, compose: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"deleted-{server.port}"
    first, second, third = new_cells(compose, name, 3)
    uploader = Uploader(tmp_path, server.uri)
    write(first, "interrupted")
    write(second)
    assert uploader.deliver(name) == 2 * POINTS
    for cell in (first, second):
        uploader.client.delete_run(Cursor(cell.folder, name, server.uri).read()["run_id"])
    assert sync(tmp_path, [name], server.uri) == 0  # what has nothing new stays deleted
    assert f"2 runs of {name!r} were deleted there and are left out" in capsys.readouterr().err
    write(first)
    write(third)
    assert uploader.deliver(name) >= 2 * POINTS
    assert "run 'seed=0' was deleted there" in capsys.readouterr().err
    made = {r.data.tags["fingerprint"]: r.info.status for r in _runs(tmp_path, server, name)}
    assert made == {first.fingerprint: "FINISHED", third.fingerprint: "FINISHED"}

    uploader.client.delete_experiment(Cursor(first.folder, name, server.uri).read()["experiment"])
    (fourth,) = new_cells(compose, name, 4)[3:]
    write(fourth)
    assert uploader.deliver(name) == POINTS
    assert f"experiment {name!r} was deleted there" in capsys.readouterr().err
    assert fourth.fingerprint in {r.data.tags["fingerprint"] for r in _runs(tmp_path, server, name)}


def test_a_run_that_the_server_has_lost_is_made_anew(
    server: Server, compose: Compose, tmp_path: Path
) -> None:
    name = f"lost-{server.port}"
    (cell,) = new_cells(compose, name, 1)
    write(cell)
    cursor = Cursor(cell.folder, name, server.uri)
    everything = {"experiment": "1", "run_id": "0" * 32, "sent": POINTS, "params": 0}
    cursor.write(everything)
    assert sync(tmp_path, [name], server.uri) == POINTS
    cursor.write(everything | cursor.now())  # nothing new, so nobody asks ...
    assert sync(tmp_path, [name], server.uri) == 0
    assert sync(tmp_path, [name], server.uri, rebuild=True) == POINTS  # ... but on request
    assert_equal(from_folders(tmp_path, name), from_mlflow(server.uri, name))


def test_what_is_longer_than_a_column_is_cut(
    server: Server, compose: Compose, tmp_path: Path
) -> None:
    name = f"long-{server.port}"
    (cell,) = new_cells(compose, name, 1)
    sources = "data.sources=" + ",".join(f"[text{i}]" for i in range(1000))
    (tmp_path / "sweeps" / name / "cells.jsonl").unlink()
    row = {"fingerprint": cell.fingerprint, "label": sources}
    add_members(tmp_path / "sweeps" / name, [row])
    record = json.loads((cell.folder / "cell.json").read_text())
    record["config"]["resources"]["classes"] = [{"when": "x" * 20_000}]
    record["science"]["data.sources"] = "y" * 20_000
    (cell.folder / "cell.json").write_text(json.dumps(record))
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    writer.metrics(1, {"recall@5": 0.5, "/" + "k" * 300: 0.25})
    writer.event("finished")
    writer.close()
    assert sync(tmp_path, [name], server.uri) == 2
    (made,) = _runs(tmp_path, server, name)
    assert made.info.run_name.startswith("data.sources=[text0],[text1]")
    assert made.info.run_name.endswith(cell.fingerprint)
    assert len(made.info.run_name) == 250
    assert made.data.metrics == {"recall_5": 0.5, "k" * 250: 0.25}


def test_a_refused_run_holds_up_no_other(server: Server, compose: Compose, tmp_path: Path) -> None:
    name = f"refused-{server.port}"
    bad, good = new_cells(compose, name, 2)
    write(bad, "interrupted")
    sync(tmp_path, [name], server.uri)
    (made,) = _runs(tmp_path, server, name)
    Uploader(tmp_path, server.uri).client.log_param(made.info.run_id, "steps", "of somebody else")
    (bad.folder / "summary.json").write_text('{"steps": 50}')
    for cell in (bad, good):
        write(cell)
    with pytest.raises(StorageError, match=r"seed=0: .*Changing param.* \(1 runs refused\)"):
        sync(tmp_path, [name], server.uri)
    assert not Cursor(good.folder, name, server.uri).is_behind()


@pytest.mark.parametrize("server", ["postgresql"], indirect=True)
def test_a_server_killed_half_way_loses_nothing(
    server: Server, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, hurry = f"killed-{server.port}", tmp_path / "hurry"
    monkeypatch.setenv("ESPALIER_TEST_HURRY", str(hurry))
    overrides = [
        f"name={name}",
        f"track.uri={server.uri}",
        "model._target_=tests.faults.FaultyConfig",
        "model.fault=slow",
        "train.steps=400",
        "eval.every=200",
        "eval.tokens=32",
    ]
    (cell,) = make_cells([("", compose(*overrides))])
    job = start_job(cell)
    cursor = cell.folder / "mlflow"
    deadline = time.monotonic() + 120
    while not any(json.loads(f.read_text())["sent"] for f in cursor.glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.kill()
    hurry.touch()
    try:
        assert job.wait(timeout=120) == 0
        assert cell.state == "finished"
        with pytest.raises(StorageError, match="espalier sync"):
            sync(tmp_path, [name])
    finally:
        server.start()
    assert sync(tmp_path, [name]) > 0  # to the server, which the run was tracked in
    assert sync(tmp_path, [name]) == 0
    assert_equal(from_folders(tmp_path, name), from_mlflow(server.uri, name))
    (made,) = _runs(tmp_path, server, name)
    assert made.info.status == "FINISHED"
    assert made.data.tags["fingerprint"] == cell.fingerprint
    names = {i.path for i in Uploader(tmp_path, server.uri).client.list_artifacts(made.info.run_id)}
    assert names >= {"cell.json", "samples.txt", "checkpoint.txt"}


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_64_cells_feed_a_server_at_once(server: Server, tmp_path: Path, compose: Compose) -> None:
    """Every cell has an uploader of its own; all start at once on a server without experiments."""
    cells, refusals = new_cells(compose, "many", 64), []

    def upload(cell: Cell) -> None:
        write(cell)
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
        list(pool.map(upload, cells))
    assert not [r for r in refusals if "locked" in r or "exists" in r]
    assert_equal(from_folders(tmp_path, "many"), from_mlflow(server.uri, "many"))
    runs = _runs(tmp_path, server, "many")
    assert len(runs) == 64
    assert {run.info.status for run in runs} == {"FINISHED"}
