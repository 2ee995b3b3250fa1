"""What disturbs jobs on a real SLURM of four nodes (tests/slurm/cluster.py): nothing is lost."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner.records import journal
from tests import command_server
from tests.command_server import Command
from tests.conftest import write_text
from tests.slurm import cluster
from tests.slurm.sweeps import SLOW, Line, Start, needs_slurm, sweep_line
from tests.slurm.watch import (
    as_each_runs,
    ask,
    assert_undisturbed,
    attempts,
    in_mlflow,
    jobs_of,
    points,
    run,
    sacct,
    until,
)

# One worker has the cluster to itself: the tests kill its daemons and count its jobs.
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Disturbed:
    """One cell in three roots: undisturbed, ended by its time limit, disturbed by the tests."""

    text: Path
    alone: Path
    limit: Path
    processes: list[Command]

    def command(self, root: Path, *arguments: str, launcher: str = "slurm") -> list[str]:
        """Return the command of the cell; bits depend on its one thread (TINY).

        Its steps take 42 s. SLURM warns a job between 45 and 15 s after its start, when the limit
        is a minute and the warning due 15 s before it: no job of such a run reaches its end alone.
        """
        slow = ["model.dropout=0.1", *SLOW, "train.steps=210"]
        return sweep_line(self.text, root, *slow, *arguments, launcher=launcher)

    def reference(self) -> Path:
        """Wait for the run that nobody disturbed."""
        assert self.processes[0].wait(timeout=280) == 0
        (folder,) = (self.alone / "runs").iterdir()
        return folder


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    """Start with the first test: SLURM checks time limits only twice a minute."""
    folder = tmp_path_factory.mktemp("disturbed")
    text = write_text(folder / "text.txt")
    cell = Disturbed(text, folder / "alone", folder / "limit", [])
    limit = [
        "name=limit",
        "resources.timeout_min=1",
        "hydra.launcher.warning_s=15",
        "hydra.launcher.sbatch={nodelist:n1}",
    ]
    for line in (cell.command(cell.alone, launcher="local"), cell.command(cell.limit, *limit)):
        cell.processes.append(command_server.start(*line))
    yield cell
    for process in cell.processes:
        process.kill()


@needs_slurm
@pytest.mark.usefixtures("disturbed")  # begun here
def test_a_sweep_runs_from_its_snapshot_and_failed_cells_are_failed_jobs(
    command: Line, tmp_path: Path
) -> None:
    grid = command("name=s", "train.sequence_length=16,70000")
    done = run(grid)
    assert done.returncode == 1, done.stderr
    (job,) = jobs_of(tmp_path)
    assert sacct(job) == ["COMPLETED", "FAILED"]
    states = sorted(journal.state(f) for f in tmp_path.glob("runs/*"))
    assert states == ["failed", "finished"]
    places = {
        json.loads(f.read_text())["code"]
        for f in tmp_path.glob("runs/*/attempts/*/environment.json")
    }
    assert places == {str(next((tmp_path / "snapshots").iterdir()))}
    again = run(grid)
    assert again.returncode == 1  # the failed one is listed, not run again
    assert jobs_of(tmp_path) == [job]
    retried = run(["runner.commands.cli", "retry", "s", "--root", str(tmp_path)])
    assert "1 cells submitted" in retried.stderr


@needs_slurm
def test_preempted_and_requeued_runs_end_with_the_same_bits(
    disturbed: Disturbed, start: Start, tmp_path: Path
) -> None:
    """One cell, disturbed in many ways, each in its own root, against the undisturbed cell.

    Where it is one of two in a task, eval.tokens tells them apart, which no weight depends on.
    """
    kinds = {
        "requeue": ["hydra.launcher.sbatch={nodelist:n1}"],
        "low": [
            "hydra.launcher.partition=low",
            "eval.tokens=32,48",
            "resources.cpus=4",
            "hydra.launcher.cells_per_job=2",
            "hydra.launcher.at_once=2",
            "hydra.launcher.sbatch={nodelist:n4}",
        ],
        "cheap": [
            "hydra.launcher.partition=cheap",
            "resources.cpus=8",
            "hydra.launcher.sbatch={nodelist:n3}",
        ],
        "spot": [
            "hydra.launcher.partition=spot",
            "resources.cpus=8",
            "hydra.launcher.sbatch={nodelist:n2}",
        ],
    }
    nodes = {"low": "n4", "cheap": "n3", "spot": "n2"}

    def disturb(kind: str) -> None:
        if kind == "requeue":
            (job,) = jobs_of(tmp_path / kind)
            subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
            return
        high = [
            "sbatch",
            "-p",
            "high",
            "-w",
            nodes[kind],
            "-c",
            "8",
            "-t",
            "1",
            "-o",
            "/dev/null",
            "--wrap",
            "sleep 3",
        ]
        subprocess.run(high, check=True, capture_output=True)

    given = {k: disturbed.command(tmp_path / k, f"name={k}", *extra) for k, extra in kinds.items()}
    running = {kind: start(line) for kind, line in given.items()}
    as_each_runs({kind: tmp_path / kind for kind in kinds}, 5, disturb)
    running.pop("spot").communicate(timeout=280)  # nothing requeues what was cancelled
    (job,) = jobs_of(tmp_path / "spot")
    assert sacct(job) == ["PREEMPTED"]
    told = [e["event"] for a in attempts(tmp_path / "spot") for e in journal.events(a)]
    assert "needs_resubmit" in told
    causes = run(["runner.commands.cli", "failures", "spot", "--root", str(tmp_path / "spot")])
    assert causes.stdout.startswith("1 of 1: preemption"), causes.stdout
    running["spot"] = start(given["spot"])
    for kind, process in running.items():
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, (kind, errors)
        assert_undisturbed(tmp_path / kind, disturbed.reference())
    assert len(list(tmp_path.glob("low/runs/*"))) == 2


@needs_slurm
def test_a_run_longer_than_its_time_limit_ends_with_the_same_bits(disturbed: Disturbed) -> None:
    assert disturbed.processes[1].wait(timeout=280) == 0
    assert len(list(disturbed.limit.glob("runs/*/attempts/*"))) > 1
    assert_undisturbed(disturbed.limit, disturbed.reference())


@needs_slurm
def test_killed_steps_daemons_and_nodes_lose_nothing(
    command: Line, start: Start, tmp_path: Path
) -> None:
    """A killed step, a restarted slurmd, a lost one, a controller down for 20 s, scancel."""
    slow = [*SLOW, "train.checkpoint.every_steps=10"]
    # No job may end while the controller is away: SLURM would tell it only 60 s later.
    kinds = {
        "step": ["hydra.launcher.sbatch={nodelist:n1}", "train.steps=90"],
        "returns": ["hydra.launcher.sbatch={nodelist:n2}", "train.steps=150"],
        "lost": ["hydra.launcher.exclude='n1,n2'", "train.steps=300"],
        "cancelled": [
            "seed=1,2",
            "hydra.launcher.max_running=1",
            "hydra.launcher.sbatch={nodelist:n1}",
        ],
    }
    given = {
        kind: command(f"name={kind}", *slow, *extra, root=tmp_path / kind)
        for kind, extra in kinds.items()
    }
    running = {kind: start(line) for kind, line in given.items()}
    jobs, nodes = {}, {}

    def disturb(kind: str) -> None:
        (job,) = jobs_of(tmp_path / kind)
        jobs[kind] = job
        if kind == "step":
            subprocess.run(["scancel", "-s", "KILL", f"{job}_0.0"], check=True)
        elif kind == "cancelled":
            subprocess.run(["scancel", job], check=True)
        else:
            nodes[kind] = ask("squeue", "-h", "-j", job, "-o", "%N")
            cluster.stop(f"slurmd-{nodes[kind]}")
        if kind == "returns":  # sooner than SLURM gives up its node (SlurmdTimeout)
            threading.Timer(8, cluster.restart, (f"slurmd-{nodes[kind]}",)).start()

    as_each_runs({kind: tmp_path / kind for kind in kinds}, 15, disturb)
    running.pop("cancelled").communicate(timeout=100)  # while SLURM finds out about the lost node
    states = sorted(journal.state(f) for f in (tmp_path / "cancelled").glob("runs/*"))
    assert states == ["interrupted", "new"]
    assert sacct(jobs["cancelled"]) == ["CANCELLED", "CANCELLED"]
    assert in_mlflow(tmp_path / "cancelled", "cancelled") == ["KILLED"]
    again = [*given["cancelled"], "hydra.launcher.max_running=2"]
    running["again"] = start(again)
    until(lambda: len(attempts(tmp_path / "step")) == 2, "second leg of the killed step")
    until(lambda: len(attempts(tmp_path / "lost")) == 2, "second leg after the lost node", 150)
    cluster.restart(f"slurmd-{nodes['lost']}")
    # A controller that forgot the requeue would drain the node of the "duplicate job".
    cluster.save(jobs["lost"])
    cluster.stop("slurmctld")
    time.sleep(20)
    cluster.restart("slurmctld")
    codes = {}
    for kind, process in running.items():
        process.communicate(timeout=280)
        codes[kind] = process.returncode
    assert codes == {"step": 0, "returns": 0, "lost": 0, "again": 0}
    for kind, legs in {"step": 2, "returns": 1, "lost": 2}.items():
        (folder,) = (tmp_path / kind / "runs").iterdir()
        assert journal.state(folder) == "finished"
        assert len(journal.attempts(folder)) == legs, kind
        assert sacct(jobs[kind]) == ["COMPLETED"]
        steps = {"step": 90, "returns": 150, "lost": 300}[kind]
        assert sorted(points(folder)) == list(range(1, steps + 1)), kind
    assert in_mlflow(tmp_path / "lost", "lost") == ["FINISHED"]
    assert in_mlflow(tmp_path / "cancelled", "cancelled") == ["FINISHED", "FINISHED"]


@needs_slurm
def test_every_fault_is_a_failed_job_and_packed_cells_have_their_own_end(
    command: Line, start: Start, tmp_path: Path
) -> None:
    faults = ["model._target_=tests.faults.FaultyConfig", "resources.hang_min=0.1"]
    alone = command("name=f", *faults, "model.fault=none,segfault,exit0,hang", root=tmp_path / "f")
    packed = command(
        "name=p",
        *faults,
        "model.fault=none,raise,oom",
        "eval.batch_size=1",
        "eval.tokens=32",
        "hydra.launcher.cells_per_job=3",
        "hydra.launcher.at_once=2",
        root=tmp_path / "p",
    )
    both = [start(line) for line in (alone, packed)]
    assert [p.wait(timeout=200) for p in both] == [1, 1]
    assert sacct(jobs_of(tmp_path / "f")[0]) == ["COMPLETED", "FAILED", "FAILED", "FAILED"]
    assert sacct(jobs_of(tmp_path / "p")[0]) == ["FAILED"]
    states = sorted(journal.state(f) for f in tmp_path.glob("*/runs/*"))
    assert states == ["failed"] * 4 + ["finished"] * 3
    assert in_mlflow(tmp_path / "f", "f") == ["FAILED", "FAILED", "FAILED", "FINISHED"]


@needs_slurm
def test_a_job_that_ends_before_its_worker_starts_is_found_shown_and_classified(
    command: Line, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        "exit": ("hydra.launcher.setup=['exit 3']", "setup", "with exit code 3: exit 3"),
        "first": ("hydra.launcher.setup=['source /nowhere','true']", "setup", "source /nowhere"),
        "srun": ("hydra.launcher.srun=['--nonsense']", "srun", "srun: "),
    }
    begun = {
        kind: start(command(f"name={kind}", key, root=tmp_path / kind))
        for kind, (key, _, _) in kinds.items()
    }
    for kind, (_, cause, said) in kinds.items():
        root = tmp_path / kind
        _, errors = begun[kind].communicate(timeout=200)
        assert begun[kind].returncode == 1, errors
        assert said in errors.replace("\n", ""), errors
        failures = run(["runner.commands.cli", "failures", kind, "--root", str(root)]).stdout
        assert failures.startswith(f"1 of 1: {cause}"), failures
        assert said in failures
        (folder,) = root.glob("runs/*")
        shown = run(["runner.commands.cli", "logs", folder.name, "--root", str(root)]).stdout
        assert said in shown
        assert not journal.attempts(folder)
    # What a caller has of a job of its own is not passed on: srun would refuse it.
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SBATCH_MEM_PER_NODE", "200M")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "200")
    monkeypatch.setenv("RANK", "1")
    mended = run(command("name=exit", "train.steps=2", root=tmp_path / "exit"))
    assert mended.returncode == 0, mended.stderr
