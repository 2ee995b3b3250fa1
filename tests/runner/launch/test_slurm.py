"""Sweeps on a real SLURM of four nodes (tests/slurm/cluster.py): requeues, faults, re-attaching."""

import fcntl
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from analysis.runs import from_folders
from analysis.stores import from_mlflow
from runner.records import checkpoint_folder, journal
from runner.records.cells import load_cell
from tests import command_server
from tests.command_server import ROOT, Command
from tests.conftest import TINY, write_text
from tests.mlflow_server import Server, assert_equal
from tests.slurm import cluster
from tests.slurm.watch import (
    as_each_runs,
    ask,
    assert_undisturbed,
    attempts,
    in_mlflow,
    jobs_of,
    points,
    run,
    running_step,
    sacct,
    until,
)

# Long by sleeping: a node of the test cluster has a fraction of a core.
SLOW = [
    "model._target_=tests.faults.FaultyConfig",
    "model.fault=slow",
    "train.steps=200",
    "eval.every=100",
    "eval.tokens=32",
]
MISSING = cluster.missing()
needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: make slurm-up")
# One worker has the cluster to itself: the tests kill its daemons and count its jobs.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    """The cluster, up; left up where it was."""
    if MISSING:
        yield
        return
    with open(f"{cluster.HOME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a machine has one: test runs take turns
        was_up = cluster.is_up()
        cluster.up()
        os.environ["SLURM_CONF"] = str(cluster.HOME / "slurm.conf")
        # Jobs find tests.faults, which is no part of a snapshot.
        os.environ["PYTHONPATH"] = str(ROOT)
        yield
        if not was_up:
            cluster.down()


Line = Callable[..., list[str]]
Start = Callable[[list[str]], Command]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command that ends with the test at the latest."""
    begun: list[Command] = []

    def inner(line: list[str]) -> Command:
        begun.append(command_server.start(*line, keep=True))
        return begun[-1]

    yield inner
    for process in begun:
        process.kill()


def _command(text: Path, root: Path, *arguments: str, launcher: str = "slurm") -> list[str]:
    base = ["runner", "-m", *TINY, f"data.sources.0.path={text}"]
    return [*base, f"root={root}", f"hydra/launcher={launcher}", *arguments]


@pytest.fixture
def command(tmp_path: Path, text: Path) -> Line:
    """The command of a sweep on SLURM: module and arguments."""

    def inner(*arguments: str, launcher: str = "slurm", root: Path = tmp_path) -> list[str]:
        return _command(text, root, *arguments, launcher=launcher)

    return inner


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
        return _command(self.text, root, *slow, *arguments, launcher=launcher)

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
def test_a_cell_of_two_nodes_starts_its_ranks_through_srun(command: Line, tmp_path: Path) -> None:
    shape = ["resources.nodes=2", "resources.processes=2", "resources.cpus=2"]
    left = run(command("name=n", *shape, "hydra.launcher.wait=false"))
    assert left.returncode == 0, left.stderr
    assert "under way" in left.stderr
    done = run(command("name=n", *shape))
    assert done.returncode == 0, done.stderr
    assert len(jobs_of(tmp_path)) == 1
    assert run(command("name=n", root=tmp_path / "one", launcher="local")).returncode == 0
    (several,), (one,) = tmp_path.glob("runs/*"), (tmp_path / "one").glob("runs/*")
    facts = json.loads((several / "attempts/0001/environment.json").read_text())
    assert facts["world"] == 4
    ours, reference = points(several), points(one)
    assert ours.keys() == reference.keys()
    assert all(abs(ours[step] - reference[step]) < 1e-5 for step in ours)


@needs_slurm
def test_a_stage_waits_for_the_jobs_it_starts_from(command: Line, tmp_path: Path) -> None:
    fine_tune = "{from:pre,match:[seed],params:{optim.lr:'1e-4,2e-4'}}"
    stages = f"hydra.sweeper.stages={{pre:{{params:{{optim.lr:1e-3}}}},ft:{fine_tune}}}"
    done = run(command("name=g", "seed=1,2", stages))
    assert done.returncode == 0, done.stderr
    first, second = sorted(jobs_of(tmp_path), key=int)
    assert (sacct(first), sacct(second)) == (["COMPLETED"] * 2, ["COMPLETED"] * 4)
    cells = [load_cell(f) for f in tmp_path.glob("runs/*")]
    assert sum("init" in cell.inputs for cell in cells) == 4
    for cell in cells:
        for before in cell.inputs.get("init", ()):
            begun = journal.events(journal.attempts(cell.folder)[0])[0]["time"]
            ended = journal.events(journal.attempts(before)[-1])[-1]["time"]
            assert begun > ended


@needs_slurm
def test_jobs_that_nobody_waits_for_feed_a_server_themselves(command: Line, tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        left = run(
            command("name=w", "seed=1,2", f"track.uri={server.uri}", "hydra.launcher.wait=false")
        )
        assert left.returncode == 0, left.stderr
        assert sacct(jobs_of(tmp_path)[0]) == ["COMPLETED"] * 2
        assert_equal(from_folders(tmp_path, "w"), from_mlflow(server.uri, "w"))
    finally:
        server.kill()


@needs_slurm
def test_slots_of_a_study_share_its_trials_and_later_ones_go_on(
    command: Line, start: Start, tmp_path: Path
) -> None:
    """Launcher and slots are killed; half the points are invalid, which ends nothing."""
    rate, width = "{low:1e-4,high:1e-1,log:true}", "{choices:[24,27]}"
    study = command(
        "name=o",
        "hydra/sweeper=optuna",
        f"hydra.sweeper.space={{optim.lr:{rate},model.width:{width}}}",
        "hydra.sweeper.trials=6",
        "hydra.launcher.max_running=2",
        *SLOW[:2],
        "train.steps=40",
    )
    first = start(study)
    until(lambda: len(list(tmp_path.glob("runs/*/metrics.jsonl"))) == 2, "two running trials")
    first.kill()
    (job,) = jobs_of(tmp_path)
    subprocess.run(["scancel", job], check=True)
    done = run(study)
    assert done.returncode == 0, done.stderr
    assert re.search(r"6 trials \((\d) complete, (\d) pruned\); best val_loss", done.stderr)
    assert "width=27 is not divisible by num_heads=2" in " ".join(done.stderr.split())
    assert {journal.state(f) for f in tmp_path.glob("runs/*")} == {"finished"}
    legs = sorted(len(journal.attempts(f)) for f in tmp_path.glob("runs/*"))
    assert legs == [1] * (len(legs) - 2) + [2, 2]
    assert len(jobs_of(tmp_path)) == 2


@needs_slurm
def test_arrays_are_cut_at_slurms_limits_and_the_rest_follows(
    command: Line, tmp_path: Path
) -> None:
    user = ["sacctmgr", "-i", "modify", "user", "root", "set"]
    cluster.configure(MaxArraySize=3)
    subprocess.run([*user, "MaxSubmitJobs=3"], check=True, capture_output=True)
    try:
        done = run(command("name=c", "seed=1,2,3,4,5", "train.steps=2"))
    finally:
        cluster.configure(MaxArraySize=10001)
        subprocess.run([*user, "MaxSubmitJobs=-1"], check=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "3 cells submitted" in done.stderr
    assert "wait for the submit limit" in done.stderr
    cells = [
        c
        for f in tmp_path.glob("sweeps/c/submissions/*.json")
        for t in json.loads(f.read_text())["tasks"]
        for c in t
    ]
    assert len(cells) == len(set(cells)) == 5


@needs_slurm
def test_all_arrays_of_a_sweep_keep_to_its_limit(
    command: Line, start: Start, tmp_path: Path
) -> None:
    """Two classes of resources, each cut at MaxArraySize, and cells that join while they run."""
    classes = "resources.classes=[{when:'seed < 3',timeout_min:9}]"
    grid = ["name=m", *SLOW, "train.steps=4", "hydra.launcher.max_running=2", classes]
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            most.append(len(ask("squeue", "-h", "-r", "-t", "R,CG", "-n", "m").splitlines()))

    cluster.configure(MaxArraySize=2)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        first = start(command(*grid, "seed=0,1,2,3"))
        until(lambda: running_step(tmp_path, 1), "training")
        more = start(command(*grid, "seed=0,1,2,3,4"))
        for process in (first, more):
            _, errors = process.communicate(timeout=280)
            assert process.returncode == 0, errors
    finally:
        ended.set()
        watcher.join()
        cluster.configure(MaxArraySize=10001)
    assert max(most) == 2
    assert [journal.state(f) for f in tmp_path.glob("runs/*")] == ["finished"] * 5


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


@needs_slurm
def test_a_killed_launcher_is_replaced_by_the_same_command(
    command: Line, start: Start, tmp_path: Path
) -> None:
    grid = command("name=k", "seed=1,2", *SLOW, "train.steps=100")
    first = start(grid)
    until(lambda: running_step(tmp_path, 1), "training")
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = run(grid)
    assert again.returncode == 0, again.stderr
    assert "2 cells are in the queue already" in again.stderr
    assert len(jobs_of(tmp_path)) == 1
    assert {journal.state(f) for f in tmp_path.glob("runs/*")} == {"finished"}


@needs_slurm
def test_two_launches_at_once_submit_each_cell_once(
    command: Line, start: Start, tmp_path: Path
) -> None:
    grid = command("name=t", "seed=1,2,3")
    both = [start(grid) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    cells = [
        c
        for f in tmp_path.glob("sweeps/t/submissions/*.json")
        for t in json.loads(f.read_text())["tasks"]
        for c in t
    ]
    assert len(cells) == len(set(cells)) == 3


@needs_slurm
def test_a_cancelled_array_saves_what_runs_and_starts_no_more(
    command: Line, start: Start, tmp_path: Path
) -> None:
    grid = command("name=c", "seed=1,2", *SLOW, "hydra.launcher.max_running=1")
    sweep = start(grid)
    until(lambda: running_step(tmp_path, 5), "training")
    told = run(["runner.commands.cli", "cancel", "c", "--root", str(tmp_path)])
    assert told.stdout.count("sent") == 2, told.stdout + told.stderr
    assert sweep.wait(timeout=120) == 1
    assert sorted(journal.state(f) for f in tmp_path.glob("runs/*")) == ["interrupted", "new"]
    (job,) = jobs_of(tmp_path)
    assert sacct(job) == ["CANCELLED", "CANCELLED"]
    (saved,) = tmp_path.glob("runs/*/checkpoints")
    assert checkpoint_folder.newest(saved) is not None
