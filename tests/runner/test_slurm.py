"""Sweeps on a real SLURM of four nodes (tests/slurm/cluster.py): states, legs, preemption, re-attaching."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner import checkpoint, journal
from runner.config import typed
from runner.sweep.slurm import SlurmConfig
from runner.sweep.snapshot import snapshot
from tests.conftest import ROOT, TINY
from tests.slurm import cluster

LONG = ["train.steps=4500", "eval.every=1500", "train.log_every=50", "model.dropout=0.1"]
DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
MISSING = [name for name in DAEMONS if shutil.which(name) is None] + ["root"] * (os.geteuid() != 0)
needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: make slurm-up")


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    """The cluster, up; left up where it was."""
    if MISSING:
        yield
        return
    was_up = (cluster.HOME / "pids").exists()
    cluster.up()
    os.environ["SLURM_CONF"] = str(cluster.HOME / "slurm.conf")
    yield
    if not was_up:
        cluster.down()


Command = Callable[..., list[str]]


@pytest.fixture
def command(tmp_path: Path, text: Path) -> Command:
    """The command of a sweep on SLURM."""

    def inner(*arguments: str, launcher: str = "slurm", root: Path = tmp_path) -> list[str]:
        base = [sys.executable, "-m", "runner", "-m", *TINY, f"data.sources.0.path={text}"]
        return [*base, f"root={root}", f"hydra/launcher={launcher}", *arguments]

    return inner


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


def _until(condition: Callable[[], object], what: str, within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {within_s} s"
        time.sleep(0.2)


def _jobs(root: Path) -> list[str]:
    return [json.loads(f.read_text())["job"] for f in root.glob("sweeps/*/submissions/*.json")]


def _sacct(job: str) -> list[str]:
    """Return the states of a job's tasks once accounting knows that all have ended."""
    states: list[str] = []

    def ended() -> bool:
        out = subprocess.run(["sacct", "-X", "-n", "-P", "-j", job, "-o", "State"], capture_output=True, text=True, check=True).stdout  # fmt: skip
        states[:] = [line.split()[0] for line in out.splitlines()]
        return bool(states) and not {"PENDING", "RUNNING", "REQUEUED"} & set(states)

    _until(ended, "end in sacct", 30)
    return sorted(states)


def _running_step(root: Path, step: int) -> bool:
    rows = [r for f in root.glob("runs/*/metrics.jsonl") for r in journal.read_lines(f)]
    return any(row.get("step", 0) >= step for row in rows)


def _same_weights(a: Path, b: Path) -> bool:
    found = [checkpoint.newest(f / "checkpoints") for f in (a, b)]
    one, two = (load_file(f / "model.safetensors") for f in found if f is not None)
    return all(torch.equal(one[name], two[name]) for name in one)


@needs_slurm
def test_a_sweep_runs_from_its_snapshot_and_failed_cells_are_failed_jobs(command: Command, tmp_path: Path) -> None:  # fmt: skip
    grid = command("name=s", "train.sequence_length=16,70000", "seed=1,2")
    done = _run(grid)
    assert done.returncode == 1, done.stderr
    (job,) = _jobs(tmp_path)
    assert _sacct(job) == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    states = sorted(journal.state(f) for f in tmp_path.glob("runs/*"))
    assert states == ["failed", "failed", "finished", "finished"]
    places = {json.loads(f.read_text())["code"] for f in tmp_path.glob("runs/*/attempts/*/environment.json")}  # fmt: skip
    assert places == {str(next((tmp_path / "snapshots").iterdir()))}
    again = _run(grid)
    assert again.returncode == 1  # the failed ones are listed, not run again
    assert _jobs(tmp_path) == [job]
    retried = _run([*grid, "hydra.sweeper.retry_failed=true"])
    assert "2 cells submitted" in retried.stderr


@needs_slurm
def test_preempted_requeued_and_timed_out_runs_end_with_the_same_bits(command: Command, tmp_path: Path) -> None:  # fmt: skip
    """Each disturbed cell against the same cell, left alone, in another root."""
    kinds = {
        "limit": ["resources.timeout_min=1", "hydra.launcher.warning_s=45"],
        "requeue": [],
        "preempt": ["hydra.launcher.partition=low", "resources.cpus=8", "hydra.launcher.sbatch={nodelist:n4}"],
    }  # fmt: skip
    running = {}
    for number, (kind, extra) in enumerate(kinds.items()):
        root = tmp_path / kind
        # One thread in all: bits depend on it.
        given = command(f"name={kind}", f"seed={number}", "train.threads=1", *LONG, *extra, root=root)  # fmt: skip
        running[kind] = subprocess.Popen(given, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for kind in ("requeue", "preempt"):
        assert running[kind].poll() is None
        _until(lambda kind=kind: _running_step(tmp_path / kind, 50), f"training of {kind}")  # type: ignore[misc]
    (job,) = _jobs(tmp_path / "requeue")
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    high = ["sbatch", "-p", "high", "-w", "n4", "-c", "8", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 3"]  # fmt: skip
    subprocess.run(high, check=True, capture_output=True)
    for kind, process in running.items():
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, (kind, errors)
    alone = {}
    for number, kind in enumerate(kinds):
        given = command(f"name={kind}", f"seed={number}", "train.threads=1", *LONG, launcher="local", root=tmp_path / f"{kind}-alone")  # fmt: skip
        alone[kind] = subprocess.Popen(given, cwd=ROOT, stderr=subprocess.DEVNULL)
    for kind in kinds:
        (folder,) = (tmp_path / kind / "runs").iterdir()
        assert len(journal.attempts(folder)) >= 2, f"{kind}: nothing interrupted it"
        rows = journal.read_lines(folder / "metrics.jsonl")
        assert any("restored" in row for row in rows)
        (job,) = _jobs(tmp_path / kind)
        assert _sacct(job) == ["COMPLETED"]
        assert alone[kind].wait(timeout=280) == 0
        (reference,) = (tmp_path / f"{kind}-alone" / "runs").iterdir()
        assert reference.name == folder.name
        assert _same_weights(folder, reference), kind


@needs_slurm
def test_a_killed_launcher_is_replaced_by_the_same_command(
    command: Command, tmp_path: Path
) -> None:
    grid = command("name=k", "seed=1,2", "train.steps=6000", "eval.every=3000")
    first = subprocess.Popen(grid, cwd=ROOT, stderr=subprocess.DEVNULL)
    _until(lambda: _running_step(tmp_path, 10), "training")
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = _run(grid)
    assert again.returncode == 0, again.stderr
    assert "2 cells are in the queue already" in again.stderr
    assert len(_jobs(tmp_path)) == 1
    assert {journal.state(f) for f in tmp_path.glob("runs/*")} == {"finished"}


@needs_slurm
def test_two_launches_at_once_submit_each_cell_once(command: Command, tmp_path: Path) -> None:
    grid = command("name=t", "seed=1,2,3")
    both = [subprocess.Popen(grid, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    cells = [c for f in tmp_path.glob("sweeps/t/submissions/*.json") for t in json.loads(f.read_text())["tasks"] for c in t]  # fmt: skip
    assert len(cells) == len(set(cells)) == 3


@needs_slurm
def test_a_cancelled_array_saves_what_runs_and_starts_no_more(command: Command, tmp_path: Path) -> None:  # fmt: skip
    grid = command("name=c", "seed=1,2", *LONG, "hydra.launcher.max_running=1")
    sweep = subprocess.Popen(grid, cwd=ROOT, stderr=subprocess.DEVNULL)
    _until(lambda: _running_step(tmp_path, 50), "training")
    cancel = [sys.executable, "-m", "runner.cli", "cancel", "c", "--root", str(tmp_path)]
    told = _run(cancel)
    assert told.stdout.count("sent") == 2, told.stdout + told.stderr
    assert sweep.wait(timeout=120) == 1
    assert sorted(journal.state(f) for f in tmp_path.glob("runs/*")) == ["interrupted", "new"]
    (job,) = _jobs(tmp_path)
    assert _sacct(job) == ["CANCELLED", "CANCELLED"]
    (saved,) = tmp_path.glob("runs/*/checkpoints")
    assert checkpoint.newest(saved) is not None


def test_a_snapshot_holds_the_code_and_changes_with_it(tmp_path: Path) -> None:
    made = snapshot(tmp_path)
    assert (made / "runner/worker.py").read_bytes() == (ROOT / "runner/worker.py").read_bytes()
    assert (made / "conf/config.yaml").exists()
    assert not list(made.rglob("*.pyc"))
    assert snapshot(tmp_path) == made


def test_unknown_launcher_keys_list_the_valid_ones() -> None:
    assert typed("hydra.launcher", SlurmConfig, {"at_once": 2}) == SlurmConfig(at_once=2)
    with pytest.raises(
        ValueError,
        match=r"hydra\.launcher\.partion is not a key; did you mean partition\?; valid: .*partition",
    ):
        typed("hydra.launcher", SlurmConfig, {"partion": "x"})
