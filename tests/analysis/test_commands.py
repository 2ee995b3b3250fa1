"""Each command: what it prints, the JSON and the figures it leaves, what it refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from analysis.__main__ import app
from tests.analysis.known import EXPONENT, TRUE, budgets, grid


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def _csv(folder: Path, table: pd.DataFrame) -> Path:
    file = folder / "runs.csv"
    table.to_csv(file, index=False)
    return file


def test_isoflop(tmp_path: Path) -> None:
    file = _csv(tmp_path, budgets(1e-3).rename(columns={"n": "N"}))
    out = tmp_path / "iso.json"
    done = _call("isoflop", file, "--n", "N", "--loss", "loss", "--bootstrap", 20, "--out", out)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["exponents"]["n"]["exponent"] == pytest.approx(EXPONENT, abs=0.03)
    assert len(report["budgets"]) == 4
    for name in ("iso.pdf", "iso.png", "iso.csv", "iso_best.png"):
        assert (tmp_path / name).exists()
    bad = _call("isoflop", file, "--n", "N", "--loss", "loss", "--method", "spline")
    assert "spline is none of parabola, akima" in bad.output


def test_envelope(tmp_path: Path) -> None:
    table = grid().assign(run=lambda t: t["n"].rank(method="dense"))
    done = _call(
        "envelope", _csv(tmp_path, table), "--run", "run", "--n", "n", "--out", tmp_path / "e.json"
    )
    assert done.exit_code == 0, done.output
    assert "8 runs" in done.output
    assert json.loads((tmp_path / "e.json").read_text())["runs"] == 8


def test_forecast_and_its_score(tmp_path: Path) -> None:
    file = _csv(tmp_path, grid(1e-3))
    names = ["--n", "n", "--d", "`flops` / (6 * n)", "--loss", "loss"]
    command = [
        "forecast",
        file,
        *names,
        "--at",
        "n=1e11,d=1e13",
        "--where",
        "flops < 1e22",
        "--bootstrap",
        50,
        "--out",
        tmp_path / "f.json",
    ]
    done = _call(*command)
    assert done.exit_code == 0, done.output
    assert "leaves" in done.output
    again = _call(*command)
    assert isinstance(again.exception, FileExistsError)
    loss = TRUE["E"] + TRUE["A"] / 1e11 ** TRUE["alpha"] + TRUE["B"] / 1e13 ** TRUE["beta"]
    later = tmp_path / "later.csv"
    pd.DataFrame({"n": [1e11], "d": [1e13], "loss": [loss]}).to_csv(later, index=False)
    told = _call(
        "score",
        tmp_path / "f.json",
        later,
        "--n",
        "n",
        "--d",
        "d",
        "--loss",
        "loss",
        "--out",
        tmp_path / "s.json",
    )
    assert told.exit_code == 0, told.output
    (point,) = json.loads((tmp_path / "s.json").read_text())["points"]
    assert point["inside"] is True
    assert abs(point["error"]) < 5e-3


def test_table(tmp_path: Path) -> None:
    rows = [
        ("bf16", "small", 2.1),
        ("nvfp4", "small", 2.2),
        ("bf16", "large", 1.9),
        ("nvfp4", "large", None),
    ]
    file = _csv(tmp_path, pd.DataFrame(rows, columns=["precision", "model", "val_loss"]))
    done = _call(
        "table",
        file,
        "--rows",
        "precision",
        "--cols",
        "model",
        "--latex",
        "--out",
        tmp_path / "t.json",
    )
    assert done.exit_code == 0, done.output
    assert r"\toprule" in done.output
    assert "4 cells, 1 without a run; 4 runs, 1 without val\\_loss" in done.output
    assert (tmp_path / "t.tex").read_text() in done.output
    assert json.loads((tmp_path / "t.json").read_text())["cells"][1]["large"] == "--"


def test_design(tmp_path: Path) -> None:
    table = grid(5e-3).assign(**{"model.width": lambda t: t["n"].rank(method="dense") * 32})
    out = tmp_path / "sweep.yaml"
    done = _call(
        "design",
        _csv(tmp_path, table),
        "--n",
        "n",
        "--d",
        "d",
        "--loss",
        "loss",
        "--keys",
        "model.width",
        "--budget",
        1e22,
        "--target",
        1e25,
        "--bootstrap",
        200,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["relative_se_after"] < report["relative_se_before"]
    assert "model.width" in out.read_text()
    both = _call("design", _csv(tmp_path, table), "--keys", "model.width", "--target", 1e25)
    assert "give one of --budget and --gpu-hours" in both.output


def test_sweep_folders_are_tables_too(tmp_path: Path) -> None:
    done = _call("ablate", tmp_path, "--baseline", "precision=bf16")
    assert "cells.jsonl does not exist" in str(done.exception)
