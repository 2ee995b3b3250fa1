"""examples/own_lab is installed as its README says, swept and drawn; so is what `init` writes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_server import ROOT, run

LAB = ROOT / "examples" / "own_lab"
QUICK = ["track.uri=off", "train.threads=1", "train.steps=2", "eval.every=2", "eval.tokens=256"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has the package, beside what this one has."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "own_lab"
    subprocess.run(["cp", "-r", LAB, source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--no-index", "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True, env=os.environ | {"PIP_CONSTRAINT": ""})
    assert (folder / "site" / "own_lab" / "conf" / "model" / "gru.yaml").exists()
    return os.environ | {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_lab_of_ones_own_is_swept_evaluated_and_drawn(
    installed: dict[str, str], tmp_path: Path
) -> None:
    swept = run(
        "runner", "-m", "-cd", str(LAB), "-cn", "sweep", f"root={tmp_path}", *QUICK, env=installed
    )
    assert swept.returncode == 0, swept.stderr
    drawn = run(
        "runner.commands.cli",
        "plots",
        "own_lab",
        *["--experiment", str(LAB), "--root", str(tmp_path)],
        env=installed,
    )
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "plots/own_lab/figures/loss_by_step.png").exists()
    with open(tmp_path / "plots/own_lab/results.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["model"], row["task.smoothing"]) for row in rows} == {
        (model, smoothing) for model in ("gru", "gpt_pico") for smoothing in ("0.0", "0.1")
    }
    assert all(float(row["weight_norm"]) > 1 for row in rows)


def test_init_writes_an_experiment_that_runs(tmp_path: Path) -> None:
    made = run("runner.commands.cli", "init", "exp/rates", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.endswith("next: espalier plan exp/rates\n")
    files = {"README.md", "figures.py", "sweep.schema.json", "sweep.yaml"}
    assert {file.name for file in (tmp_path / "exp" / "rates").iterdir()} == files
    plan = run("runner.commands.cli", "plan", "exp/rates", "seed=1", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "4 cells" in plan.stdout
    again = run("runner.commands.cli", "init", "exp/rates", cwd=tmp_path)
    assert "exp/rates/sweep.yaml exists; choose another folder" in again.stderr
