"""Optuna trials as cells: no barrier, resumed after a stop, pruned by intermediate values."""

import json
import math
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.grid.language import Axis
from runner.launch.study import Study, load_study
from runner.launch.study_config import StudyConfig, read_study, save_study
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records import journal
from runner.records.cells import Cell, load_cell, make_cells
from tests.command_server import run, start
from tests.conftest import TINY

Run = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., dict[str, Any]]
LR, DEPTH = "{low:1e-4,high:1e-1,log:true}", "{low:1,high:3,integer:true}"
SPACE = f"hydra.sweeper.space={{optim.lr:{LR},model.depth:{DEPTH}}}"
OPTUNA = ["-m", "hydra/sweeper=optuna", SPACE, "name=o"]


def _states(study: Study) -> list[str]:
    return sorted(t.state.name for t in study.study.get_trials())


@pytest.mark.slow
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
    typo = espalier(*OPTUNA, "hydra.sweeper.trials=7", "hydra.sweeper.metric=val/loss")
    assert typo.returncode == 1
    assert "another study than the last of o: metric: val/loss now, val_loss before" in typo.stderr
    assert "error: hydra.sweeper.metric=val/loss was never logged; there are: " in typo.stderr
    assert _states(load_study(tmp_path / "sweeps" / "o")) == ["FAIL"]
    odd = espalier(*OPTUNA[:2], "name=o", "hydra.sweeper.space={model.width:{choices:[27,29]}}")
    assert odd.returncode == 1
    assert "error: none of 20 drawn points is valid: model: width=2" in odd.stderr


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


RATES = {"optim.lr": Axis(low=1e-4, high=1e-1, log=True)}


def _new_study(compose: Compose, *overrides: str, **keys: Any) -> Study:
    (base,) = make_cells([("base", compose("name=o", *overrides))])
    keys = {"space": RATES, "trials": 4, "startup": 2} | keys
    save_study(base.sweep, StudyConfig(**keys), base)
    return load_study(base.sweep)


def _end(cell: Cell | None, event: str = "finished", **values: float) -> None:
    """Do what a worker does at its end, without the study hearing of it."""
    assert cell is not None
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    if values:
        writer.metrics(12, values)
    writer.event(event)
    writer.close()


def test_a_study_is_another_one_if_base_metric_direction_or_space_differ(compose: Compose) -> None:
    first = _new_study(compose)
    cells = [first.next_cell() for _ in range(4)]
    for loss, cell in enumerate(cells, start=2):
        _end(cell, val_loss=float(loss), loss=-float(loss))
    assert first.is_over()
    assert first.best().startswith("4 trials (4 complete); best val_loss 2.0000: trial 0")
    others = [
        _new_study(compose, "train.steps=6"),
        _new_study(compose, "model.width=32"),
        _new_study(compose, metric="loss"),
        _new_study(compose, direction="maximize"),
        _new_study(compose, space={"optim.lr": Axis(low=1e-4, high=1e-2, log=True)}),
    ]
    assert len({study.fingerprint for study in (first, *others)}) == 6
    assert {study.best() for study in others} == {"no trial yet"}
    same = [
        _new_study(compose, "optim.lr=0.5"),  # is drawn in any case
        _new_study(compose, "train.micro_batch=2", sampler="random", trials=9, seed=3),
    ]
    for study in same:
        assert study.fingerprint == first.fingerprint
        assert "4 complete" in study.best()
    # The first draws are those of the first study: their cells have ended, and are told at once.
    other = _new_study(compose, direction="maximize", metric="loss")
    other.next_cell()
    assert "2 complete" in other.best()
    assert "best loss -2.0000" in other.best()


def test_the_keys_in_which_a_study_differs_from_the_one_before_are_named(
    compose: Compose, tmp_path: Path
) -> None:
    study = _new_study(compose)
    (base,) = make_cells([("base", compose("name=o", "train.steps=6"))])
    changed = save_study(study.folder, StudyConfig(space=RATES, metric="loss"), base)
    assert changed == ["metric: loss now, val_loss before", "train.steps: 6 now, 12 before"]
    assert save_study(study.folder, StudyConfig(space=RATES, metric="loss"), base) == []
    assert load_study(study.folder, 0, study.fingerprint).cfg == study.cfg
    with pytest.raises(ConfigError, match=r"space\.optim\.lrr.* did you mean optim\.lr\?"):
        _new_study(compose, space={"optim.lrr": RATES["optim.lr"]})


def test_a_study_of_an_earlier_release_goes_on(compose: Compose) -> None:
    """It has the name of its sweep in the log, and its record has no fingerprint."""
    study = _new_study(compose)
    _, record = read_study(study.folder)
    (study.folder / "study.log").unlink()
    before = {"study": record["study"], "base": record["base"]}
    storage.write_atomically(study.folder / "study.json", json.dumps(before))
    old = Study(study.folder, study.cfg, study.base)
    _end(old.next_cell(), val_loss=2.5)
    again = _new_study(compose)
    assert again.next_cell() is not None
    assert again.best().startswith("2 trials (1 complete, 1 running); best val_loss 2.5000")


def test_a_cell_is_told_whoever_finished_it(compose: Compose) -> None:
    first = _new_study(compose)
    done, failed, stopped, bad = (first.next_cell() for _ in range(4))
    _end(done, val_loss=2.8)  # its launcher was killed, it was not
    _end(failed, "failed")
    first.record_outcome(failed)
    _end(stopped, "interrupted", val_loss=9.0)
    _end(bad, "diverged")
    second = _new_study(compose, "train.micro_batch=2")
    assert not second.is_over()
    again = second.next_cell()  # its attempt has ended: nobody waits a minute
    assert again is not None
    assert again.fingerprint == stopped.fingerprint
    assert load_cell(stopped.folder).config.train.micro_batch == 2  # as the latest launch says
    assert second.next_cell() is None  # but whoever has just taken it has a minute
    _end(stopped, val_loss=2.4)
    assert second.is_over()
    assert second.best().startswith(
        "4 trials (2 complete, 1 fail, 1 pruned); best val_loss 2.4000: trial 2"
    )
    _end(failed, val_loss=2.1)  # `espalier retry`
    third = _new_study(compose)
    assert third.is_over()
    assert third.best().startswith("4 trials (3 complete, 1 pruned); best val_loss 2.1000: trial 1")
    assert third.next_cell() is None


def test_a_pruned_trial_counts_once_a_grid_has_finished_it(compose: Compose) -> None:
    study = _new_study(compose, trials=2, pruner="median", startup=1)
    good, bad = study.next_cell(), study.next_cell()
    _end(good, val_loss=2.0)
    assert not study.should_stop(good)
    assert study.record_outcome(good)
    _end(bad, "interrupted", val_loss=5.0)
    assert study.should_stop(bad)
    assert study.is_over()
    assert "1 complete, 1 pruned" in study.best()
    _end(bad, val_loss=1.5)
    assert study.is_over()
    assert study.best().startswith("2 trials (2 complete); best val_loss 1.5000: trial 1")


def test_an_invalid_point_is_a_pruned_trial_with_its_reason(compose: Compose) -> None:
    width = {"model.width": Axis(low=30, high=70, integer=True)}
    study = _new_study(compose, space=width, trials=12, startup=12)
    while (cell := study.next_cell()) is not None:
        assert cell.config.model.width % 4 == 0  # two heads of even dimension
        _end(cell, val_loss=2.0)
    assert study.is_over()
    reasons = study.invalid_points()
    assert f"12 trials ({12 - len(reasons)} complete, {len(reasons)} pruned)" in study.best()
    assert any("is not divisible by num_heads=2" in reason for reason in reasons)


def test_a_metric_that_no_run_logs_ends_the_study_with_its_reason(compose: Compose) -> None:
    study = _new_study(compose, metric="val/loss")
    first, second = study.next_cell(), study.next_cell()
    _end(first, val_loss=2.8)
    assert study.record_outcome(first)
    assert study.next_cell() is None
    assert "metric=val/loss was never logged; there are: val_loss" in str(study.problem())
    _end(second, val_loss=2.1)
    mended = _new_study(compose)
    assert mended.next_cell() is not None
    assert "2 complete, 1 running" in mended.best()
    assert mended.problem() is None


def test_odd_ends_of_trials(compose: Compose) -> None:
    study = _new_study(compose, trials=3)
    nan, cancelled, gone = (study.next_cell() for _ in range(3))
    _end(nan, val_loss=math.nan)  # bad, not unknown
    _end(cancelled, "interrupted")
    cancelled.cancelled.touch()
    for file in (gone.folder, *gone.folder.rglob("*")):
        if file.is_file():
            file.unlink()
    fresh = study.next_cell()  # in the place of the one whose folder was deleted
    assert fresh is not None
    assert fresh.fingerprint not in (nan.fingerprint, cancelled.fingerprint)
    assert study.next_cell() is None  # nobody starts what is cancelled
    assert study.best().startswith("3 trials (1 pruned, 2 running)")
    cancelled.cancelled.unlink()
    again = study.next_cell()
    assert again is not None
    assert again.fingerprint == cancelled.fingerprint
    study.study.ask()  # as a launcher that was killed while it drew
    assert not study.is_over()
    assert study.best().startswith("3 trials (1 pruned, 2 running)")


@pytest.mark.slow
def test_a_killed_launchers_trials_are_taken_over_and_awaited(tmp_path: Path, text: Path) -> None:
    """Its workers live on: the next launch waits for them, and knows their results."""
    slow = ["model._target_=tests.faults.FaultyConfig", "model.fault=slow", "train.steps=40"]
    command = ["runner", *OPTUNA, *TINY, f"data.sources.0.path={text}", f"root={tmp_path}", *slow]
    command += ["hydra.launcher.jobs=2", "hydra.sweeper.trials=3"]
    first = start(*command)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.kill()
    second = run(*command)
    assert second.returncode == 0, second.stderr
    assert "3 trials (3 complete); best val_loss" in second.stderr
    study = load_study(tmp_path / "sweeps" / "o")
    values = [t.value for t in study.study.get_trials()]
    assert f"best val_loss {min(values):.4f}" in second.stderr
    assert [len(journal.attempts(f)) for f in tmp_path.glob("runs/*")] == [1] * 3
