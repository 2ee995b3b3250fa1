"""Optuna trials as cells: no barrier, resumed after a stop, pruned by intermediate values."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.launch.study import Study, load_study
from runner.machine import storage
from runner.records import journal
from tests.command_server import run, start
from tests.conftest import TINY

Run = Callable[..., subprocess.CompletedProcess[str]]
LR, DEPTH = "{low:1e-4,high:1e-1,log:true}", "{low:1,high:3,integer:true}"
SPACE = f"hydra.sweeper.space={{optim.lr:{LR},model.depth:{DEPTH}}}"
OPTUNA = ["-m", "hydra/sweeper=optuna", SPACE, "name=o"]


def _states(study: Study) -> list[str]:
    return sorted(t.state.name for t in study.study.get_trials())


def test_trials_are_cells_and_a_finished_study_runs_nothing(espalier: Run, tmp_path: Path) -> None:
    told = f"hydra.sweeper.on_finish='echo $ESPALIER_STATES >> {tmp_path}/told.txt'"
    done = espalier(*OPTUNA, told, "hydra.sweeper.trials=6", "hydra.sweeper.startup=2")
    assert done.returncode == 0, done.stderr
    study = load_study(tmp_path / "sweeps" / "o")
    assert _states(study) == ["COMPLETE"] * 6
    for trial in study.study.get_trials():
        (cell,) = (c for c in study.cells() if c.fingerprint == trial.user_attrs["fingerprint"])
        assert cell.config.optim.lr == trial.params["optim.lr"]
        assert cell.config.model.depth == trial.params["model.depth"]
        rows = storage.read_lines(cell.folder / "metrics.jsonl")
        assert trial.value == [r["val_loss"] for r in rows if "val_loss" in r][-1]
    assert "best val_loss" in done.stderr
    again = espalier(*OPTUNA, told, "hydra.sweeper.trials=6")
    assert again.returncode == 0
    assert (tmp_path / "told.txt").read_text() == '{"finished": 6}\n'
    assert len(list(tmp_path.glob("runs/*"))) == 6
    more = espalier(*OPTUNA, "hydra.sweeper.trials=7")
    assert more.returncode == 0
    assert _states(load_study(tmp_path / "sweeps" / "o")) == ["COMPLETE"] * 7


@pytest.mark.slow
def test_a_stopped_study_goes_on_with_its_open_trials(tmp_path: Path, text: Path) -> None:
    slow = [
        "model._target_=tests.faults.FaultyConfig",
        "model.fault=slow",
        "train.steps=30",
        "hydra.launcher.jobs=2",
    ]
    command = [
        "runner",
        *OPTUNA,
        *TINY,
        f"data.sources.0.path={text}",
        f"root={tmp_path}",
        *slow,
        "hydra.sweeper.trials=3",
    ]
    first = start(*command)
    deadline = time.monotonic() + 60
    while len([f for f in tmp_path.glob("runs/*") if journal.state(f) == "running"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    study = load_study(tmp_path / "sweeps" / "o")
    assert _states(study) == ["RUNNING"] * 2
    for note in (tmp_path / "sweeps/o/slots").glob("[0-9]*"):
        note.unlink()  # as if a minute had passed
    second = run(*command)
    assert second.returncode == 0, second.stderr
    assert _states(load_study(tmp_path / "sweeps" / "o")) == ["COMPLETE"] * 3
    assert sorted(len(journal.attempts(f)) for f in tmp_path.glob("runs/*")) == [1, 2, 2]


@pytest.mark.slow
def test_a_bad_trial_is_pruned_while_it_runs(espalier: Run, tmp_path: Path) -> None:
    bad = [
        "model._target_=tests.faults.FaultyConfig",
        "model.fault=slow",
        "train.steps=60",
        "eval.every=5",
        "hydra.launcher.jobs=1",
    ]
    space = "hydra.sweeper.space={optim.lr:{choices:[1e-9,1e-2]}}"
    done = espalier(
        *OPTUNA[:2],
        space,
        "name=p",
        *bad,
        "hydra.sweeper.trials=8",
        "hydra.sweeper.pruner=median",
        "hydra.sweeper.startup=1",
        "hydra.sweeper.sampler=random",
        "hydra.sweeper.seed=3",
        "seed=1",
    )
    assert done.returncode == 0, done.stderr
    study = load_study(tmp_path / "sweeps" / "p")
    by_rate = {t.params["optim.lr"]: t.state.name for t in study.study.get_trials()}
    assert by_rate[1e-9] == "PRUNED", study.best()
    (pruned,) = (c for c in study.cells() if c.config.optim.lr == 1e-9)
    assert pruned.state == "interrupted"
    assert max(r.get("step", 0) for r in storage.read_lines(pruned.folder / "metrics.jsonl")) < 60
