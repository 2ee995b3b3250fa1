import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models.precision import PrecisionConfig
from runner.cli import app

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_trained_sweep_is_shown_drawn_and_spoken_to(espalier: Run, tmp_path: Path) -> None:
    assert espalier("-m", "seed=1,2", "name=x", "eval.every=4").returncode == 0
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


def test_an_unknown_sweep_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "known").mkdir(parents=True)
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
