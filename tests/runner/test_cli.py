import subprocess
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

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
