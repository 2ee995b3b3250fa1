"""The local launcher and its MLflow view, through the command line."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from analysis.runs import from_folders
from runner.launch.pool import Pool
from runner.machine import storage
from runner.records import checkpoint_folder, journal
from runner.records.cells import freeze_cell, make_cells
from runner.views.table import LiveTable
from tests.command_server import ROOT, run, start
from tests.conftest import TINY
from tests.slurm.watch import running_step

Run = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., dict[str, Any]]


def test_grid_runs_once_and_is_then_skipped(espalier: Run, tmp_path: Path) -> None:
    grid = ["-m", "seed=1,2,1", "optim.lr=1e-3,0.001", "name=g"]
    first = espalier(*grid)
    assert first.returncode == 0, first.stderr
    assert "2 cells (2 new); 2 to run" in first.stderr
    again = espalier(*grid)
    assert "2 cells (2 finished); 0 to run" in again.stderr
    runs = from_folders(tmp_path, "g")
    assert list(runs.table["state"]) == ["finished"] * 2
    assert sorted(runs.table["seed"]) == [1, 2]
    assert set(runs.table["precision"] + runs.table["model"]) == {"fp32gpt_pico"}


def test_a_bad_point_stops_the_sweep_before_anything_runs(espalier: Run, tmp_path: Path) -> None:
    done = espalier("-m", "optim.lr=1e-3,-1")
    assert done.returncode != 0
    assert "lr=-1.0 must be positive" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_crashing_cell_fails_alone(espalier: Run, tmp_path: Path, text: Path) -> None:
    done = espalier("-m", "train.sequence_length=16,100000", "name=c")
    assert done.returncode == 1
    states = sorted(from_folders(tmp_path, "c").table["state"])
    assert states == ["failed", "finished"]
    assert "1 failed" in espalier("-m", "train.sequence_length=16,100000", "name=c").stderr


def test_a_dead_holder_does_not_keep_the_cell(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        journal.claim(tmp_path)
        signal.pause()
    while not journal.attempts(tmp_path):
        pass
    assert journal.state(tmp_path) == "running"
    assert journal.claim(tmp_path) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert journal.state(tmp_path) == "interrupted"
    assert journal.claim(tmp_path) is not None


def _own_group(grid: list[str]) -> "subprocess.Popen[bytes]":
    """Start a launcher, a real process: signals go to all processes of its group."""
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *grid],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path, text: Path) -> None:
    grid = [
        "-m",
        *TINY,
        f"data.sources.0.path={text}",
        f"root={tmp_path}",
        "name=i",
        "seed=1,2",
        "train.steps=400",
        "eval.every=200",
    ]
    first = _own_group(grid)
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size > 2000 for f in tmp_path.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(timeout=60) == 130
    folders = sorted(tmp_path.glob("runs/*"))
    assert all(journal.state(f) in ("new", "interrupted") for f in folders)
    again = run("runner", *grid)
    assert again.returncode == 0, again.stderr
    assert "2 to run" in again.stderr
    assert {journal.state(f) for f in folders} == {"finished"}
    restored = [
        row
        for f in folders
        for row in storage.read_lines(f / "metrics.jsonl")
        if row.get("restored")
    ]
    assert restored


def test_a_stop_is_never_a_failure_and_a_later_ctrl_c_says_what_it_kills(
    tmp_path: Path, text: Path
) -> None:
    faulty = ["model._target_=tests.faults.FaultyConfig", "model.fault=stuck", "name=two"]
    grid = ["-m", *TINY, f"data.sources.0.path={text}", f"root={tmp_path}", *faulty]
    sweep = start("runner", *grid, keep=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/summary.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (folder,) = tmp_path.glob("runs/*")
    frozen = (folder / "cell.json").read_text()
    for wait_s in (0.05, 1.2, 0.0):  # the second comes at once: uv and timeout pass on a first
        assert sweep.poll() is None
        sweep.send_signal(signal.SIGINT)
        time.sleep(wait_s)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, errors
    said = ["Ctrl-C again kills them", "still save", "1 running cells killed", "1 interrupted"]
    assert [errors.find(words) for words in said] == sorted(errors.find(words) for words in said)
    assert -1 not in [errors.find(words) for words in said], errors
    assert journal.state(folder) == "interrupted"
    assert [e["event"] for e in journal.events(journal.attempts(folder)[0])] == [
        "started",
        "interrupted",
    ]
    assert (folder / "cell.json").read_text() == frozen


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_single_run_takes_new_execution_keys_and_ends_at_the_second_ctrl_c(
    espalier: Run, tmp_path: Path, text: Path
) -> None:
    faulty = ["model._target_=tests.faults.FaultyConfig", "model.fault=stuck"]
    failed = espalier(*faulty, "train.device=cuda")
    assert failed.returncode == 1
    assert "torch sees no GPU here" in failed.stderr
    line = [*TINY, f"data.sources.0.path={text}", f"root={tmp_path}", *faulty]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ESPALIER_LAUNCHED": ""}
    again = start("runner", *line, "train.device=auto", env=environment, keep=True)
    (folder,) = tmp_path.glob("runs/*")
    deadline = time.monotonic() + 120
    while not (folder / "attempts/0002/environment.json").exists():
        assert time.monotonic() < deadline, again.written()
        time.sleep(0.05)
    again.send_signal(signal.SIGINT)
    while "stopping after this step" not in again.written()[1]:
        assert time.monotonic() < deadline, again.written()
        time.sleep(0.05)
    time.sleep(1.2)  # sooner it would be the same key, pressed for long
    again.send_signal(signal.SIGINT)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 75, errors
    assert "stopping after this step" in errors
    assert "ending without saving" in errors
    assert journal.state(folder) == "interrupted"


def test_a_holder_on_another_host_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    attempt = journal.claim(tmp_path)
    assert attempt is not None
    lease = json.loads((attempt / "lease.json").read_text())
    (attempt / "lease.json").write_text(json.dumps(lease | {"host": "elsewhere"}))
    (attempt / "heartbeat").touch()
    assert journal.state(tmp_path) == "running"
    assert journal.claim(tmp_path) is None
    now = (attempt / "heartbeat").stat().st_mtime
    os.utime(attempt / "heartbeat", (now - 600, now - 600))
    assert journal.state(tmp_path) == "interrupted"
    first = journal.Journal(tmp_path, attempt)
    first.close()
    assert not first.superseded()
    assert journal.claim(tmp_path) is not None
    assert first.superseded()


@pytest.mark.slow
def test_a_second_launcher_waits_for_the_first_and_takes_over_what_it_leaves(
    tmp_path: Path, text: Path
) -> None:
    grid = [
        "-m",
        *TINY,
        f"data.sources.0.path={text}",
        f"root={tmp_path}",
        "name=w",
        "seed=1,2",
        "train.steps=1000",
        "eval.every=500",
        "train.checkpoint.every_steps=50",
    ]
    first = _own_group(grid)
    deadline = time.monotonic() + 120
    while len([f for f in tmp_path.glob("runs/*") if journal.state(f) == "running"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = start("runner", *grid, keep=True)
    while "another launcher" not in second.written()[1]:
        assert second.poll() is None, "the second launcher ended"
        time.sleep(0.02)
    one = next(f for f in tmp_path.glob("runs/*") if journal.state(f) == "running")
    os.kill(
        json.loads((journal.attempts(one)[-1] / "lease.json").read_text())["pid"], signal.SIGKILL
    )
    os.killpg(first.pid, signal.SIGKILL)  # the launcher and its template die with it
    _, errors = second.communicate(timeout=120)
    first.wait()
    assert second.returncode == 0, errors
    folders = list(tmp_path.glob("runs/*"))
    assert [journal.state(f) for f in folders] == ["finished"] * 2
    assert len(journal.attempts(one)) == 2


@pytest.mark.slow
def test_a_cell_of_two_processes_runs_under_the_launcher(espalier: Run, tmp_path: Path) -> None:
    for flag in (["-m"], []):
        done = espalier(
            *flag,
            "resources.processes=2",
            "train.parallel=fsdp",
            f"name=p{len(flag)}",
            f"seed={len(flag)}",
        )
        assert done.returncode == 0, done.stderr
    facts = [
        json.loads(f.read_text()) for f in tmp_path.glob("runs/*/attempts/0001/environment.json")
    ]
    assert [f["world"] for f in facts] == [2, 2]


def test_more_gpus_than_there_are_is_refused(espalier: Run) -> None:
    done = espalier("-m", "resources.gpus=99", "train.batch_size=99")
    assert done.returncode != 0
    assert "resources.gpus=99 but this machine has" in done.stderr


def test_a_resume_on_other_terms_says_so(espalier: Run, tmp_path: Path) -> None:
    assert espalier("train.steps=6").returncode == 0
    (folder,) = tmp_path.glob("runs/*")
    attempt = journal.attempts(folder)[0]
    facts = json.loads((attempt / "environment.json").read_text())
    facts |= {"torch": "1.0", "backends": ["TransformerEngine"]}
    (attempt / "environment.json").write_text(json.dumps(facts))
    (attempt / "events.jsonl").unlink()  # as if it had been killed
    again = espalier("train.steps=6")
    assert again.returncode == 0
    assert "not bit-identically: torch: 1.0 at first" in again.stderr
    assert "backends: ['TransformerEngine'] at first, [] now" in again.stderr


def test_an_error_of_the_launcher_saves_what_runs(tmp_path: Path, compose: Compose) -> None:
    faulty = ["model._target_=tests.faults.FaultyConfig", "model.fault=slow", "train.steps=400"]
    (cell,) = make_cells([("", compose(*faulty))])
    freeze_cell(cell)

    def tick() -> None:
        if running_step(tmp_path, 2):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        Pool(jobs=1, threads=1).run([cell], [], tick)
    assert cell.state == "interrupted"
    assert checkpoint_folder.newest(cell.folder / "checkpoints") is not None


def test_the_table_outlives_what_it_cannot_read_and_follows_a_retried_cell(
    tmp_path: Path, compose: Compose
) -> None:
    (cell,) = make_cells([("", compose())])
    freeze_cell(cell)
    table = LiveTable([cell])

    def shown() -> str:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(table.render())
        return console.export_text()

    assert journal.claim(cell.folder) is not None
    (cell.folder / "summary.json").write_text("")  # as a full disk may leave it
    assert "unreadable" in shown()
    (cell.folder / "summary.json").write_text('{"steps": 12}')
    journal.record_end(cell.folder, "failed", error="Crash", message="")
    assert "failed" in shown()
    assert journal.claim(cell.folder) is not None
    assert "running" in shown()
    journal.record_end(cell.folder, "finished")
    assert "finished" in shown()
