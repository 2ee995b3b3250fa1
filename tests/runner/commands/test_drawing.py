"""The verbs that draw: where their files go, and what they leave alone."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.__main__ import app as analysis
from runner.commands.cli import app
from tests.command_server import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def _git(*arguments: str) -> str:
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", *author, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _call(*arguments: str, tool: object = app) -> str:
    done = CliRunner().invoke(tool, list(arguments))  # type: ignore[arg-type]
    return done.output + str(done.exception or "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::analysis.pooling.PooledWarning")  # curves by size alone
def test_figures_of_a_run_go_to_plots_and_into_the_experiment_by_publishing_alone(
    espalier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    shutil.copytree(ROOT / "experiments" / "demo", "demo")
    _git("init", "-q")
    _git("add", "-A")
    _git("commit", "-qm", "all")
    assert espalier("-m", "name=demo", "precision=fp32,bf16").returncode == 0

    assert "no figures of demo yet" in _call("paper", "demo")
    assert "plots/demo/figures/loss_by_size.png" in _call("plots", "demo")
    assert _call("report", "demo").strip() == "sweeps/demo/report.html"
    assert "latexmk" in _call("paper", "demo")
    assert "2 cells" in _call(
        "ablate", "sweeps/demo", "--baseline", "precision.compute=fp32", tool=analysis
    )
    rows = ["--rows", "precision.compute", "--cols", "seed"]
    assert "2 cells" in _call("table", "sweeps/demo", *rows, tool=analysis)
    key = next((tmp_path / "runs").iterdir()).name
    assert "look.html" in _call("look", key, "--text", "line 1")
    assert "MB" in _call("pack", "demo")
    assert _git("status", "--porcelain") == ""

    assert "published: 8 files in" in _call("plots", "demo", "--publish")
    changed = {line[3:] for line in _git("status", "--porcelain").splitlines()}
    figures = [f"demo/figures/loss_by_{x}.{k}" for x in ("size", "flops") for k in ("png", "pdf")]
    assert {"demo/results.csv", *figures} <= changed
    assert (tmp_path / "demo/results.csv").read_text().count("\n") == 3


def test_what_analysis_writes_by_default_is_ignored_by_git() -> None:
    for command in analysis.registered_commands:
        assert command.callback is not None
        out = inspect.signature(command.callback).parameters["out"].default
        for file in (str(out), str(out.with_suffix(".json"))):
            subprocess.run(["git", "check-ignore", "-q", file], cwd=ROOT, check=True)


@pytest.mark.slow
def test_drawing_overwrites_no_other_file(
    espalier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert espalier("name=x").returncode == 0
    key = next((tmp_path / "runs").iterdir()).name
    mine = tmp_path / "mine"
    mine.mkdir()
    owned = ["val_loss_by_step.csv", "numbers.tex", "losses.csv", "page.html"]
    for name in owned:
        (mine / name).write_text("my own")
    not_ours = "exists and was not made by espalier"
    assert f"mine/val_loss_by_step.csv {not_ours} plots" in _call("plots", "x", "--out", "mine")
    assert f"mine/losses.csv {not_ours} look" in _call("look", key, "--text=line", "--out=mine")
    assert "mine/page.html exists and is no report" in _call("report", "x", "--out=mine/page.html")
    assert "leaves none of 1 cells" in _call("plots", "x", "--where", "seed > 9")
    assert "name 'sead' is not defined" in _call("plots", "x", "--where", "sead > 9")
    assert "val_loss_by_step.png" in _call("plots", "x", "--where", "seed < 9")
    assert f"mine/numbers.tex {not_ours} paper" in _call("paper", "x", "--out", "mine")
    assert {name: (mine / name).read_text() for name in owned} == dict.fromkeys(owned, "my own")
    assert sorted(file.name for file in mine.iterdir()) == sorted(owned), "a refusal leaves files"
    for _ in range(2):
        assert _call("report", "x", "--out", "page.html").strip() == "page.html"
    assert "page.html is not a folder" in _call("plots", "x", "--out", "page.html/x")
    assert "/proc/x cannot be written" in _call("plots", "x", "--out", "/proc/x")
    assert "no sweep 'y' under" in _call("plots", "y")
    assert "--publish needs" in _call("plots", "x", "--publish")
    drawn = json.loads((tmp_path / "plots/x/made.json").read_text())
    assert "val_loss_by_step.png" in drawn["files"]


def test_a_figures_file_that_fails_is_one_line(
    espalier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert espalier("name=x").returncode == 0
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "sweep.yaml").write_text("name: x\n")
    (folder / "figures.py").write_text(
        "def main(runs, folder):\n    return runs.finished['nothing']\n"
    )
    assert f"{folder}/figures.py, line 2: no 'nothing'" in _call("plots", "x")
    (folder / "figures.py").write_text("def main(runs, folder):\n    open('/no/such/file')\n")
    assert "No such file or directory: '/no/such/file'" in _call("plots", "x")
    assert not (tmp_path / "plots/x/made.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a folder read-only")
def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(ROOT / "tests/fixtures/runs_2026_11/root", root)
    main = f"{sys.executable} -m runner.commands.cli plots grid --root {root}"
    script = f"mount --bind {root} {root} && mount -o remount,ro,bind {root} && {main}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 1
    expected = f"error: {root} cannot be written; choose a folder that can by --out"
    assert done.stderr.strip() == expected
