"""Benchmarks in and beside training: asked at steps, of finished runs, of runs that still train."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.paired import over_seeds
from analysis.runs import from_folders
from analysis.stores import from_mlflow
from runner.commands.cli import app
from runner.grid.evaluation_cells import evaluation_cells
from runner.launch.mlflow_process import UPLOADER_RUNS
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.machine.text_files import read_json
from runner.records.cells import find_cell, load_cell, make_cells
from runner.records.new_checkpoints import new_checkpoints
from runner.records.sweep_cells import sweep_cells
from runner.views.mlflow import embedded_uri
from tests.command_server import start
from tests.conftest import TINY

Run = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., dict[str, Any]]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a benchmark of twelve questions, named squares."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"q": f"the square of {i}:", "a": [str(i * i), str(i * i + 1)], "gold": 0}
        for i in range(12)
    ]
    (folder / "squares.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec = {
        "task": "squares",
        "files": ["squares.jsonl"],
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{a}}",
        "metadata": {"version": 1},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "squares.yaml").write_text(json.dumps(spec))
    return folder


def _keys(task: Path) -> list[str]:
    return ["tasks=[squares]", f"data={task}", f"include={task}"]


def _cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    return done.output + str(done.exception or "")


def test_a_run_asks_as_it_trains_and_at_its_end(espalier: Run, task: Path, tmp_path: Path) -> None:
    harness = [f"eval.harness.{key}" for key in (*_keys(task), "every=6")]
    done = espalier("name=x", "track.uri=null", "data.num_workers=0", *harness)
    assert done.returncode == 0, done.stderr
    (cell,) = sweep_cells(tmp_path, "x")
    rows = storage.read_lines(cell.folder / "metrics.jsonl")
    scores = {row["step"]: row["squares/acc"] for row in rows if "squares/acc" in row}
    assert list(scores) == [6, 12]
    (file,) = cell.folder.glob("evals/*.json")
    found = json.loads(file.read_text())
    assert (found["step"], found["scores"][0]["value"]) == (12, scores[12])
    row = from_folders(tmp_path, "x").table.iloc[0]
    assert row["squares/acc"] == scores[12]
    assert "12 questions, 0 shots" in row["squares/asked"]
    assert _cli("sync", "x", "--root", str(tmp_path)).startswith("0 points")
    stored = from_mlflow(embedded_uri(tmp_path), "x")
    assert stored.history[stored.history["key"] == "squares/acc"]["step"].tolist() == [6, 12]


@pytest.mark.slow
def test_two_processes_ask_what_one_asks(espalier: Run, task: Path, tmp_path: Path) -> None:
    harness = [f"eval.harness.{key}" for key in (*_keys(task), "every=6")]
    asked: list[dict[int, float]] = []
    for way in ([], ["resources.processes=2"], ["resources.processes=2", "train.parallel=fsdp"]):
        root = tmp_path / str(len(way))
        done = espalier("name=x", f"root={root}", *harness, *way)
        assert done.returncode == 0, done.stderr
        (cell,) = sweep_cells(root, "x")
        (file,) = cell.folder.glob("evals/*.json")
        assert json.loads(file.read_text())["step"] == 12
        rows = storage.read_lines(cell.folder / "metrics.jsonl")
        asked.append({row["step"]: row["squares/acc"] for row in rows if "squares/acc" in row})
    assert list(asked[0]) == [6, 12]
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.slow
def test_a_sweep_is_evaluated_as_cells_and_its_runs_get_the_scores(
    espalier: Run, task: Path, tmp_path: Path
) -> None:
    assert espalier("-m", "seed=1,2", "name=s", "track.uri=null").returncode == 0
    root = ["--root", str(tmp_path)]
    planned = _cli("eval", "s", *_keys(task), "--plan", *root)
    assert planned.count("new") >= 2, planned
    told = _cli("eval", "s", *_keys(task), "--jobs", "1", *root)
    assert UPLOADER_RUNS not in os.environ  # its uploader has ended: later workers start their own
    runs = from_folders(tmp_path, "s").table
    assert runs["squares/acc"].notna().all(), told
    assert {cell.state for cell in sweep_cells(tmp_path, "s-eval")} == {"finished"}
    own = from_folders(tmp_path, "s-eval").table
    assert sorted(own["squares/acc"]) == sorted(runs["squares/acc"])
    shown = from_mlflow(embedded_uri(tmp_path), "s")
    assert sorted(shown.table["squares/acc"]) == sorted(runs["squares/acc"])
    assert shown.history[shown.history["key"] == "squares/acc"]["step"].tolist() == [12, 12]
    again = _cli("eval", "s", *_keys(task), "--jobs", "1", *root)
    assert len(sweep_cells(tmp_path, "s-eval")) == 2, again
    assert over_seeds(runs, ["model.width"], "squares/acc")["n"].tolist() == [2]
    one = runs["fingerprint"].iloc[0]
    for file in (tmp_path / "runs" / one / "evals").glob("*"):
        file.unlink()
    told = _cli("eval", one[:8], *_keys(task), "limit=5", "context=64", "--jobs", "1", *root)
    with pytest.raises(ValueError, match=r"2 ways .*evaluate the runs alike") as refused:
        over_seeds(from_folders(tmp_path, "s").table, ["model.width"], "squares/acc")
    assert "5 questions" in str(refused.value)
    assert str(refused.value).count("cut to 16 tokens") == 1, told  # the training's, not 64


@pytest.mark.slow
def test_a_run_judged_anew_has_one_row_with_what_was_found_last(
    espalier: Run, task: Path, tmp_path: Path
) -> None:
    keys = ["_target_=runner.evaluate.config.HarnessConfig", *_keys(task)]
    also = [f"+eval.also.squares.{key}" for key in keys]
    for limit in (5, 12):
        options = ["seed=1", "name=s", "track.uri=null", f"+eval.also.squares.limit={limit}"]
        done = espalier("-m", *also, *options)
        assert done.returncode == 0, done.stderr
    trained, late = sweep_cells(tmp_path, "s")
    found = read_json(next((late.folder / "evals").glob("*.json")))
    ours, stored = from_folders(tmp_path, "s"), from_mlflow(embedded_uri(tmp_path), "s")
    for runs in (ours, stored):
        assert runs.table["fingerprint"].tolist() == [trained.fingerprint]
        assert "evaluates" not in runs.table
    (row,) = ours.table.to_dict("records")
    assert "12 questions" in row["squares/asked"]
    assert row["squares/acc"] == found["scores"][0]["value"]


@pytest.mark.slow
def test_averaged_weights_have_scores_of_their_own(
    espalier: Run, task: Path, tmp_path: Path
) -> None:
    assert (
        espalier("-m", "name=s", "train.average.kind=ema", "train.average.decay=0.5").returncode
        == 0
    )
    (cell,) = sweep_cells(tmp_path, "s")
    root = ["--root", str(tmp_path), "--jobs", "1"]
    told = _cli("eval", "s", *_keys(task), *root) + _cli(
        "eval", "s", *_keys(task), "--average", *root
    )
    row = from_folders(tmp_path, "s").table.iloc[0]
    assert {"squares/acc", "squares/acc_average", "squares/acc_average_stderr"} <= set(row.index), (
        told
    )
    assert len(list(cell.folder.glob("evals/*.json"))) == 2


@pytest.mark.slow
def test_an_evaluation_follows_the_checkpoints_of_a_run(
    text: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry = tmp_path / "hurry"
    monkeypatch.setenv("ESPALIER_TEST_HURRY", str(hurry))
    slow = [
        "model._target_=tests.faults.FaultyConfig",
        "model.fault=slow",
        "train.steps=400",
        "train.checkpoint.every_steps=40",
        "eval.every=200",
    ]

    def hurry_once_it_follows() -> None:
        while not any(
            "squares/acc" in f.read_text() for f in tmp_path.glob("runs/*/metrics.jsonl")
        ):
            time.sleep(0.05)
        hurry.touch()

    training = start(
        "runner", "-m", *TINY, *slow, f"data.sources.0.path={text}", f"root={tmp_path}", "name=f"
    )
    while not list(tmp_path.glob("runs/*/cell.json")):
        assert training.poll() is None
        time.sleep(0.02)
    Thread(target=hurry_once_it_follows, daemon=True).start()
    told = _cli("eval", "f", *_keys(task), "follow=true", "--jobs", "1", "--root", str(tmp_path))
    assert training.wait(timeout=120) == 0
    (cell,) = sweep_cells(tmp_path, "f-eval")
    assert cell.state == "finished", told
    steps = [
        row["step"]
        for row in storage.read_lines(cell.folder / "metrics.jsonl")
        if "squares/acc" in row
    ]
    assert len(steps) >= 2, told
    assert steps[-1] == 400
    assert steps == sorted(set(steps))
    (upstream,) = sweep_cells(tmp_path, "f")
    (file,) = upstream.folder.glob("evals/*.json")
    assert json.loads(file.read_text())["step"] == 400
    assert list(new_checkpoints(upstream.folder, 400, lambda: False)) == []
    assert [f.name for f in new_checkpoints(upstream.folder, 0, lambda: False)] == ["00000400"]


def test_a_run_is_held_against_counted_ngrams(espalier: Run, task: Path, tmp_path: Path) -> None:
    assert espalier("name=x").returncode == 0
    (cell,) = sweep_cells(tmp_path, "x")
    out, root = tmp_path / "ngram.json", ["--root", str(tmp_path)]
    told = _cli("ngram", cell.fingerprint, "--order", "5", "--out", str(out), *_keys(task), *root)
    found = json.loads(out.read_text())
    (run,) = from_folders(tmp_path, "x").table.to_dict("records")
    assert found["val_tokens"] == run["val_tokens"]
    assert 0.2 < found["val_loss"] < run["val_loss"]  # twelve steps are no match
    assert found["scores"][0]["n"] == 12
    assert "12 questions" in told
    assert "does not fit 64 bits" in _cli("ngram", cell.fingerprint, "--order", "9", *root)


def test_details_of_the_validation_loss(espalier: Run, tmp_path: Path) -> None:
    assert espalier("name=x", "eval.details=true", "eval.batch_size=3").returncode == 0
    (run,) = from_folders(tmp_path, "x").table.to_dict("records")
    rows = json.loads((tmp_path / "runs" / run["fingerprint"] / "positions.json").read_text())
    assert [row["position"] for row in rows] == list(range(16))
    assert sum(row["n"] for row in rows) == run["val_tokens"]
    mean = sum(row["loss"] * row["n"] for row in rows) / run["val_tokens"]
    assert mean == pytest.approx(run["val_loss"], rel=1e-5)
    assert 0 <= run["val_accuracy"] <= 1
    assert 0 <= run["val_calibration_error"] <= 1
    cfg = load_cell(tmp_path / "runs" / run["fingerprint"]).config.model
    assert (
        run["state_bytes"] == 2 * cfg.depth * 16 * cfg.kv_heads * cfg.attention_dim * 4
    )  # keys and values, fp32


def test_without_lm_eval_nothing_is_begun(
    compose: Compose, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[eval\]'"):
        make_cells([("", compose(*(f"eval.harness.{key}" for key in _keys(task))))])


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_said(
    espalier: Run, compose: Compose, task: Path, tmp_path: Path
) -> None:
    assert espalier("name=x").returncode == 0
    (cell,) = sweep_cells(tmp_path, "x")
    root = ["--root", str(tmp_path)]
    assert "give tasks=[lambada,...]" in _cli("eval", "x", *root)
    assert "'tasks' is no override" in _cli("eval", "x", "tasks", *root)
    assert "eval.harness.taks is not a key" in _cli("eval", "x", "tasks=[squares]", "taks=3", *root)
    assert "no task 'squars'; near: squares" in _cli(
        "eval", "x", "tasks=[squars]", f"include={task}", *root
    )
    assert "no cell is 'nothing'" in _cli("eval", "nothing", *_keys(task), *root)
    (other,) = make_cells([("", compose("seed=9", "name=x"))])
    from runner.records.cells import freeze_cell, join_sweep

    freeze_cell(other)
    join_sweep("x", [other])
    cells, _, skipped = evaluation_cells(tmp_path, "x", _keys(task))
    assert [c.config.inputs["init"].run for c in cells] == [cell.fingerprint]
    assert "no checkpoint (new): left out" in skipped[0]
    assert find_cell(tmp_path, cell.fingerprint).fingerprint != cells[0].fingerprint
