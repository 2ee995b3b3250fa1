"""Sweeps on a real SLURM: ranks over nodes, stages, studies, arrays, launchers that come and go."""

import json
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from analysis.runs import from_folders
from analysis.stores import from_mlflow
from runner.records import checkpoint_folder, journal
from runner.records.cells import load_cell
from tests.mlflow_server import Server, assert_equal
from tests.slurm import cluster
from tests.slurm.sweeps import SLOW, Line, Start, needs_slurm
from tests.slurm.watch import (
    ask,
    jobs_of,
    points,
    run,
    running_step,
    sacct,
    until,
)

# One worker has the cluster to itself: the tests kill its daemons and count its jobs.
pytestmark = pytest.mark.slow


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
