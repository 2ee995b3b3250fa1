import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models.precision_config import PrecisionConfig
from runner.commands.cli import app
from runner.commands.experiments import experiment_folder, sweep_command
from runner.records import journal
from tests.command_server import ROOT, run, start
from tests.conftest import TINY

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_trained_sweep_is_shown_drawn_and_spoken_to(espalier: Run, tmp_path: Path) -> None:
    done = espalier("-m", "seed=1,2", "name=x", "eval.every=4")
    assert done.returncode == 0, done.stderr
    assert f"next: `espalier plots x --root {tmp_path}`" in " ".join(done.stderr.split())
    cli, root = CliRunner(), ["--root", str(tmp_path)]
    shown = cli.invoke(app, ["status", "x", *root])
    assert shown.output.count("finished") == 2, shown.output
    drawn = cli.invoke(app, ["plots", "x", *root])
    assert drawn.exit_code == 0, drawn.output
    assert "default figures" in drawn.output
    for name in ("step", "tokens", "flops", "wall_s"):
        assert (tmp_path / f"plots/x/val_loss_by_{name}.png").stat().st_size > 5000
        assert (tmp_path / f"plots/x/val_loss_by_{name}.csv").exists()
    key = next((tmp_path / "runs").iterdir()).name
    spoken = cli.invoke(app, ["generate", key, "--prompt", "line", "--tokens", "5", *root])
    assert spoken.exit_code == 0, spoken.output
    assert spoken.output.startswith("line")


def test_a_grid_beside_the_sweep_is_of_the_same_experiment() -> None:
    named = {"mqar": "mqar", "mqar_full": "mqar", "lr_transfer": "lr_transfer", "mqar_x": "mqar_x"}
    assert {name: experiment_folder(name).name for name in named} == named
    grids = [("mqar", None), ("mqar_full", None), ("mqar_full", "sweep"), ("mqar", "full")]
    chosen = [sweep_command(name, grid)[-1] for name, grid in grids]
    assert chosen == ["sweep", "full", "sweep", "full"]


def _cli(tmp_path: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--root", str(tmp_path)])
    return result.output + str(result.exception or "")


@pytest.mark.slow
def test_failures_are_grouped_explained_and_retried(espalier: Run, tmp_path: Path) -> None:
    lengths = "train.sequence_length=16,70000,80000"
    assert espalier("-m", lengths, "seed=1,2", "name=f").returncode == 1
    told = _cli(tmp_path, "failures", "f")
    assert told.startswith("4 of 6: data"), told
    assert "lower train.sequence_length" in told
    assert "data/order.py" in told
    assert "seed=" not in told.split("\n")[0]
    failed = [f for f in tmp_path.glob("runs/*") if journal.state(f) == "failed"]
    assert "2 of 6: data, all train.sequence_length=70000" not in told  # one cause, two lengths
    assert "DataError" in (failed[0] / "attempts/0001/events.jsonl").read_text()
    assert "lower train.sequence_length" in _cli(tmp_path, "logs", failed[0].name)
    why = _cli(tmp_path, "why", failed[0].name[:8])
    assert "is failed" in why
    assert "train.sequence_length: " in why
    assert "seed" not in why  # the nearest finished cell has the same seed
    assert "none of: oom, gpu memory" in _cli(tmp_path, "retry", "f", "--class", "weather")
    assert "nothing to retry" in _cli(tmp_path, "retry", "f", "--class", "disk")
    assert "is another cell" in _cli(tmp_path, "retry", "f", "train.sequence_length=16")
    assert "is no override" in _cli(tmp_path, "retry", "f", "train.log_every")
    again = _cli(tmp_path, "retry", "f", "--class", "data", "--jobs", "2", "train.log_every=3")
    assert again.startswith("again: 4 of 4: data")
    frozen = json.loads((failed[0] / "cell.json").read_text())
    assert frozen["config"]["train"]["log_every"] == 3
    assert all(len(journal.attempts(f)) == 2 for f in failed)
    assert "no cell is 'zzz'" in _cli(tmp_path, "why", "zzz")


def test_failed_cells_share_the_keys_that_set_them_apart(espalier: Run, tmp_path: Path) -> None:
    assert espalier("-m", "train.sequence_length=16,70000", "seed=1,2", "name=k").returncode == 1
    assert _cli(tmp_path, "failures", "k").startswith(
        "2 of 4: data, all train.sequence_length=70000\n"
    )


@pytest.mark.slow
def test_a_cancelled_sweep_stops_and_the_next_launch_goes_on(tmp_path: Path, text: Path) -> None:
    grid = [
        "-m",
        *TINY,
        f"data.sources.0.path={text}",
        f"root={tmp_path}",
        "name=c",
        "seed=1,2,3",
        "train.steps=800",
        "eval.every=200",
        "hydra.launcher.jobs=1",
    ]
    sweep = start("runner", *grid)
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size > 2000 for f in tmp_path.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    told = _cli(tmp_path, "cancel", "c")
    assert told.count("asked to save and stop") == 1
    assert told.count("will not start") == 2
    sweep.wait(timeout=60)
    folders = list(tmp_path.glob("runs/*"))
    assert sorted(journal.state(f) for f in folders) == ["interrupted", "new", "new"]
    shorter = run("runner", *grid)
    assert shorter.returncode == 0, shorter.stderr
    assert {journal.state(f) for f in folders} == {"finished"}
    assert "left as it is" in _cli(tmp_path, "cancel", "c")


def test_diff_shows_execution_keys_too(espalier: Run, tmp_path: Path) -> None:
    assert espalier("seed=1").returncode == 0
    assert espalier("seed=2", "train.micro_batch=2").returncode == 0
    one, two = sorted(
        tmp_path.glob("runs/*"),
        key=lambda f: json.loads((f / "cell.json").read_text())["config"]["seed"],
    )
    lines = _cli(tmp_path, "diff", one.name, two.name).splitlines()
    assert lines == ["seed: 1 | 2", "train.micro_batch: None | 2"]


@pytest.mark.slow
def test_plan_names_the_experiments(tmp_path: Path) -> None:
    # Real processes: the command becomes another one (os.execv).
    command = [sys.executable, "-m", "runner.commands.cli", "plan"]
    unknown = subprocess.run(
        [*command, "nowhere"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "there are: " in unknown.stderr
    assert "chinchilla_refit, demo, " in unknown.stderr
    shown = subprocess.run(
        [*command, "demo", f"root={tmp_path}", "seed=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "6 cells (6 new)" in shown.stdout, shown.stderr
    assert "467.9k" in shown.stdout
    other = subprocess.run(
        [*command, "in_tool", "-cn", "quick", f"root={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "8 cells (8 new)" in other.stdout, other.stderr


def test_an_unknown_sweep_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "known").mkdir(parents=True)
    (tmp_path / "sweeps" / "known" / "cells.jsonl").write_text('{"fingerprint": "a"}\n')
    result = CliRunner().invoke(app, ["status", "other", "--root", str(tmp_path)])
    assert "there are: known" in str(result.exception)


def test_a_checkpoint_of_another_model_is_refused(espalier: Run, tmp_path: Path) -> None:
    for depth in (1, 2):
        assert espalier(f"model.depth={depth}", f"seed={depth}").returncode == 0
    one, two = sorted(tmp_path.glob("runs/*"), key=lambda f: len(list(f.rglob("*"))))
    shutil.rmtree(one / "checkpoints")
    shutil.copytree(two / "checkpoints", one / "checkpoints")
    refused = CliRunner().invoke(app, ["generate", str(one)])
    assert "is a checkpoint of another model" in str(refused.exception)
    assert "layers.1" in str(refused.exception)


def test_averaged_weights_speak_when_asked(espalier: Run, tmp_path: Path) -> None:
    assert espalier("train.average.kind=last", "train.average.every=2").returncode == 0
    (run,) = tmp_path.glob("runs/*")
    options = ["generate", str(run), "--prompt", "line", "--tokens", "60", "--temperature", "1"]
    texts = [CliRunner().invoke(app, [*options, *more]).output for more in ([], ["--average"])]
    assert all(text.startswith("line") for text in texts)
    assert texts[0] != texts[1]


def test_a_device_that_is_not_there_is_named(espalier: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = espalier("train.device=cuda")
    assert done.returncode != 0
    assert "train.device=cuda but torch sees no GPU here" in done.stderr


def test_bf16_on_a_gpu_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one answer that is made up: no machine at hand has such an old GPU."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4; use precision=fp32"):
        PrecisionConfig(compute="bf16").build(torch.device("cuda"))


def test_a_slow_bf16_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.bfloat16: 3.0, torch.float32: 1.0}
    monkeypatch.setattr("models.precision._product_s", seconds.__getitem__)
    notice = PrecisionConfig(compute="bf16").notice("cpu")
    assert notice is not None
    assert "3.0 times as long" in notice
    assert PrecisionConfig(compute="fp32").notice("cpu") is None
    assert PrecisionConfig(compute="bf16").notice("cuda") is None
