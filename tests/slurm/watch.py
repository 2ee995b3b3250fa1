"""What a test reads of sweeps on the cluster: jobs in accounting, runs on disk and in MLflow."""

import json
import sqlite3
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from runner.machine import storage
from runner.records import checkpoint_folder, journal, metrics
from tests import command_server


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a module with its arguments to its end."""
    return command_server.run(*command, timeout=300)


def until(condition: Callable[[], object], what: str, within_s: float = 120) -> None:
    """Wait until `condition` holds; fail with the name `what` after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {within_s} s"
        time.sleep(0.2)


def jobs_of(root: Path) -> list[str]:
    """Return the ids of the job arrays submitted for the sweeps under `root`."""
    return [json.loads(f.read_text())["job"] for f in root.glob("sweeps/*/submissions/*.json")]


def sacct(job: str) -> list[str]:
    """Return the sorted states of a job's tasks once accounting has the end of all."""
    states: list[str] = []

    def ended() -> bool:
        out = subprocess.run(
            ["sacct", "-X", "-n", "-P", "-j", job, "-o", "State"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        states[:] = [line.split()[0] for line in out.splitlines()]
        return bool(states) and not {"PENDING", "RUNNING", "REQUEUED"} & set(states)

    until(ended, "end in sacct")
    return sorted(states)


def running_step(root: Path, step: int) -> bool:
    """True once a run under `root` has logged `step`."""
    rows = [r for f in root.glob("runs/*/metrics.jsonl") for r in storage.read_lines(f)]
    return any(row.get("step", 0) >= step for row in rows)


def as_each_runs(roots: Mapping[str, Path], step: int, act: Callable[[str], None]) -> None:
    """Call `act` with each name as soon as a run under its root has logged `step`."""
    left = dict(roots)

    def acted_on_all() -> bool:
        for name in [name for name, root in left.items() if running_step(root, step)]:
            del left[name]
            act(name)
        return not left

    until(acted_on_all, f"step {step} of {', '.join(roots)}", 240)


def ask(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def attempts(root: Path) -> list[Path]:
    """Return the attempts of all runs under `root`."""
    return [a for f in root.glob("runs/*") for a in journal.attempts(f)]


def points(run: Path) -> dict[int, float]:
    """Return the loss of each step by the rules of docs/run-folder.md."""
    losses: dict[int, float] = {}
    for row in metrics.read(run):
        if "loss" in row:
            assert row["step"] not in losses, f"step {row['step']} occurs twice"
            losses[row["step"]] = row["loss"]
    return losses


def in_mlflow(root: Path, name: str) -> list[str]:
    """Return the sorted states of a sweep's runs in MLflow's embedded store, after a sync."""
    done = run(["runner.commands.cli", "sync", name, "--root", str(root)])
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(root / "mlflow" / "mlflow.db") as store:
        return sorted(row[0] for row in store.execute("SELECT status FROM runs"))


def same_weights(a: Path, b: Path) -> bool:
    """Return whether the weights of two runs' newest checkpoints are bit-identical."""
    newest = [checkpoint_folder.newest(run / "checkpoints") for run in (a, b)]
    one, two = (load_file(f / "model.safetensors") for f in newest if f is not None)
    return all(torch.equal(one[name], two[name]) for name in one)


def assert_undisturbed(root: Path, reference: Path) -> None:
    """Assert that each run under `root` took several attempts and else equals the reference."""
    assert sacct(max(jobs_of(root), key=int)) == ["COMPLETED"]
    runs = list((root / "runs").iterdir())
    assert reference.name in [folder.name for folder in runs]
    for folder in runs:
        assert len(journal.attempts(folder)) >= 2, f"{folder}: nothing interrupted it"
        assert any("restored" in row for row in storage.read_lines(folder / "metrics.jsonl"))
        assert same_weights(folder, reference), folder
        assert points(folder) == points(reference), folder
