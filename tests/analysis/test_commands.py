"""Each command: what it prints, the JSON and the figures it leaves, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.analysis.calls import call, write_ablation, write_csv
from tests.analysis.known import EXPONENT, TRUE, budgets, grid


def test_isoflop(tmp_path: Path) -> None:
    file = write_csv(tmp_path, budgets(1e-3).rename(columns={"n": "N"}))
    out = tmp_path / "iso.json"
    done = call("isoflop", file, "--n", "N", "--loss", "loss", "--bootstrap", 20, "--out", out)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["exponents"]["n"]["exponent"] == pytest.approx(EXPONENT, abs=0.03)
    assert len(report["budgets"]) == 4
    for name in ("iso.pdf", "iso.png", "iso.csv", "iso_best.png"):
        assert (tmp_path / name).exists()
    bad = call("isoflop", file, "--n", "N", "--loss", "loss", "--method", "spline")
    assert "--method spline is none of parabola, akima" in str(bad.exception)


def test_envelope(tmp_path: Path) -> None:
    table = grid().assign(run=lambda t: t["n"].rank(method="dense"))
    done = call(
        "envelope",
        write_csv(tmp_path, table),
        "--run",
        "run",
        "--n",
        "n",
        "--out",
        tmp_path / "e.json",
    )
    assert done.exit_code == 0, done.output
    assert "8 runs" in done.output
    assert json.loads((tmp_path / "e.json").read_text())["runs"] == 8


def test_forecast_and_its_score(tmp_path: Path) -> None:
    file = write_csv(tmp_path, grid(1e-3))
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
    done = call(*command)
    assert done.exit_code == 0, done.output
    assert "leaves" in done.output
    again = call(*command)
    assert isinstance(again.exception, FileExistsError)
    loss = TRUE["E"] + TRUE["A"] / 1e11 ** TRUE["alpha"] + TRUE["B"] / 1e13 ** TRUE["beta"]
    later = tmp_path / "later.csv"
    pd.DataFrame({"n": [1e11], "d": [1e13], "loss": [loss]}).to_csv(later, index=False)
    told = call(
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


def test_fit_says_what_is_not_identified_and_takes_held_parameters(tmp_path: Path) -> None:
    n = np.geomspace(2e7, 4e9, 8)
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / (20 * n) ** TRUE["beta"]
    noise = 1 + 1e-3 * np.array([1, -1, 0, 2, -2, 1, 0, -1])
    table = pd.DataFrame({"n": n, "d": 20 * n, "run": list("aabbccdd"), "loss": loss * noise})
    file, out = write_csv(tmp_path, table), tmp_path / "f.json"
    names = [file, "--n", "n", "--d", "d", "--loss", "loss", "--bootstrap", 20, "--out", out]
    held = [
        "--fix",
        "alpha=0.34",
        "--fix",
        "beta=0.28",
        "--residuals",
        "linear",
        "--cluster",
        "run",
    ]
    done = call("fit", *names, *held, "--no-check", "--flops", 1e22)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["parameters"]["alpha"]["low"] == report["parameters"]["alpha"]["high"] == 0.34
    assert report["objective"]["kind"] == "sum of Huber(0.001) of the response"
    asked = report["compute_optimal"]["1e+22"][2]["estimate"]
    assert report["doubts"] == [
        f"extrapolation: {asked:.4g} tokens per parameter, the fitted runs have 20"
    ]
    told = call("forecast", *names[:-1], tmp_path / "to_come.json", "--at", "n=1e9,d=1e12", *held)
    assert told.exit_code == 0, told.output
    assert "d / n is 20 in all runs: their terms cannot be told apart" in told.output
    assert "extrapolation: 1000 tokens per parameter, the fitted runs have 20" in told.output


def test_chain_writes_both_laws_and_the_accuracy_of_a_larger_run(tmp_path: Path) -> None:
    table = grid(1e-3)
    table["accuracy"] = 0.25 + 0.7 / (1 + np.exp(6 * (table["loss"] - 2.6)))
    names = [write_csv(tmp_path, table), "--n", "n", "--d", "d", "--loss", "loss"]
    out = tmp_path / "c.json"
    more = ["--accuracy", "accuracy", "--bootstrap", 20, "--at", "n=1e11,d=1e13", "--out", out]
    done = call("chain", *names, *more)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["laws"] == ["chinchilla", "sigmoid"]
    (point,) = report["points"]
    loss = TRUE["E"] + TRUE["A"] / 1e11 ** TRUE["alpha"] + TRUE["B"] / 1e13 ** TRUE["beta"]
    true = 0.25 + 0.7 / (1 + np.exp(6 * (loss - 2.6)))
    assert point["low"] < true < point["high"]
    assert point["accuracy"] == pytest.approx(true, abs=0.01)
    wrong = call("chain", *names, "--accuracy", "accuracy", "--at", "n=1,d=1", "--laws", "mine")
    assert "--laws mine is none of olmo_ladder, gadre" in str(wrong.exception)


def test_table(tmp_path: Path) -> None:
    rows = [
        ("bf16", "small", 2.1),
        ("nvfp4", "small", 2.2),
        ("bf16", "large", 1.9),
        ("nvfp4", "large", None),
    ]
    file = write_csv(tmp_path, pd.DataFrame(rows, columns=["precision", "model", "val_loss"]))
    done = call(
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
    done = call(
        "design",
        write_csv(tmp_path, table),
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
    both = call("design", write_csv(tmp_path, table), "--keys", "model.width", "--target", 1e25)
    assert "give one of --budget and --gpu-hours" in str(both.exception)


def test_sweep_folders_are_tables_too(tmp_path: Path) -> None:
    done = call("ablate", tmp_path, "--baseline", "precision=bf16")
    assert "cells.jsonl does not exist" in str(done.exception)


def test_an_ablation_has_the_unpaired_comparison_beside_the_paired(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    done = call("ablate", write_ablation(tmp_path), "--baseline", "precision=bf16", "--out", out)
    assert done.exit_code == 0, done.output
    assert "unpaired (Welch)" in done.output
    report = json.loads(out.read_text())
    (paired,), (unpaired,) = report["differences"], report["unpaired_differences"]
    assert paired["difference"] == pytest.approx(unpaired["difference"])
    assert unpaired["low"] < paired["low"] < paired["high"] < unpaired["high"]
    assert report["doubts"] == [line for line in done.output.splitlines() if "too wide" in line]
    apart = ["--where", "(precision == 'bf16') == (seed < 3)", "--out", tmp_path / "c.json"]
    alone = call("ablate", tmp_path / "runs.csv", "--baseline", "precision=bf16", *apart)
    assert "no run of nvfp4 has a partner equal in seed" in alone.output
    assert json.loads((tmp_path / "c.json").read_text())["doubts"] == []
    fewer = ["--where", "seed < 3", "--out", tmp_path / "b.json"]
    less = call("ablate", tmp_path / "runs.csv", "--baseline", "precision=bf16", *fewer)
    assert "leaves 4 of 6 rows" in less.output
