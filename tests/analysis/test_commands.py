"""Each command: what it prints, the JSON and the figures it leaves, what it refuses."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from analysis.__main__ import app, main
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
    assert "--method spline is none of parabola, akima" in str(bad.exception)


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


def test_fit_says_what_is_not_identified_and_takes_held_parameters(tmp_path: Path) -> None:
    n = np.geomspace(2e7, 4e9, 8)
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / (20 * n) ** TRUE["beta"]
    noise = 1 + 1e-3 * np.array([1, -1, 0, 2, -2, 1, 0, -1])
    table = pd.DataFrame({"n": n, "d": 20 * n, "run": list("aabbccdd"), "loss": loss * noise})
    file, out = _csv(tmp_path, table), tmp_path / "f.json"
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
    done = _call("fit", *names, *held, "--no-check", "--flops", 1e22)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["parameters"]["alpha"]["low"] == report["parameters"]["alpha"]["high"] == 0.34
    assert report["objective"]["kind"] == "sum of Huber(0.001) of the response"
    asked = report["compute_optimal"]["1e+22"][2]["estimate"]
    assert report["doubts"] == [
        f"extrapolation: {asked:.4g} tokens per parameter, the fitted runs have 20"
    ]
    told = _call("forecast", *names[:-1], tmp_path / "to_come.json", "--at", "n=1e9,d=1e12", *held)
    assert told.exit_code == 0, told.output
    assert "d / n is 20 in all runs: their terms cannot be told apart" in told.output
    assert "extrapolation: 1000 tokens per parameter, the fitted runs have 20" in told.output


def test_chain_writes_both_laws_and_the_accuracy_of_a_larger_run(tmp_path: Path) -> None:
    table = grid(1e-3)
    table["accuracy"] = 0.25 + 0.7 / (1 + np.exp(6 * (table["loss"] - 2.6)))
    names = [_csv(tmp_path, table), "--n", "n", "--d", "d", "--loss", "loss"]
    out = tmp_path / "c.json"
    more = ["--accuracy", "accuracy", "--bootstrap", 20, "--at", "n=1e11,d=1e13", "--out", out]
    done = _call("chain", *names, *more)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["laws"] == ["chinchilla", "sigmoid"]
    (point,) = report["points"]
    loss = TRUE["E"] + TRUE["A"] / 1e11 ** TRUE["alpha"] + TRUE["B"] / 1e13 ** TRUE["beta"]
    true = 0.25 + 0.7 / (1 + np.exp(6 * (loss - 2.6)))
    assert point["low"] < true < point["high"]
    assert point["accuracy"] == pytest.approx(true, abs=0.01)
    wrong = _call("chain", *names, "--accuracy", "accuracy", "--at", "n=1,d=1", "--laws", "mine")
    assert "--laws mine is none of olmo_ladder, gadre" in str(wrong.exception)


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
    assert "give one of --budget and --gpu-hours" in str(both.exception)


def test_sweep_folders_are_tables_too(tmp_path: Path) -> None:
    done = _call("ablate", tmp_path, "--baseline", "precision=bf16")
    assert "cells.jsonl does not exist" in str(done.exception)


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Call the commands as a process does; return the one line of an error."""

    def inner(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["analysis", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        capsys.readouterr()
        line = ended.value.code
        assert isinstance(line, str), "no message: it ended with 0, or with a usage text"
        assert "\n" not in line
        return line

    return inner


def _ablation(folder: Path, name: str = "runs.csv") -> Path:
    """Write runs of two recipes and three seeds; return the file."""
    table = pd.DataFrame(
        {
            "precision": ["bf16"] * 3 + ["nvfp4"] * 3,
            "seed": [1, 2, 3] * 2,
            "val_loss": [2.0, 2.1, 2.2, 2.3, 2.41, 2.52],
        }
    )
    table.to_csv(folder / name, index=False)
    return folder / name


@pytest.mark.parametrize("kind", ["csv", "linked csv", "law", "shapes"])
def test_no_command_overwrites_its_input(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = _ablation(tmp_path, "ablation.csv")
    laws = tmp_path / "fit.csv"
    grid(1e-3).to_csv(laws, index=False)
    (tmp_path / "table.csv").hardlink_to(runs)
    before = {file: file.read_bytes() for file in (runs, laws)}
    names = ["--n", "n", "--d", "d", "--loss", "loss"]
    commands = {
        "csv": [
            ("ablate", runs, "--baseline", "precision=bf16"),
            ("fit", laws, *names),
            ("fit", laws, *names, "--out", laws),
            ("isoflop", laws, *names[:4], "--out", tmp_path / "fit.json"),
            ("envelope", laws, "--run", "seed", "--n", "n", "--out", tmp_path / "fit.json"),
            ("score", laws, laws, "--out", tmp_path / "fit.json"),
        ],
        "linked csv": [("table", runs, "--rows", "precision")],
        "law": [("fit", runs, "--law", f"{laws}:X", "--out", laws)],
        "shapes": [
            (
                "design",
                runs,
                "--target=1",
                "--keys=n",
                "--budget=1",
                "--shapes",
                laws,
                "--out",
                laws,
            )
        ],
    }
    for command in commands[kind]:
        assert "is an input of python -m analysis" in refused(*command), command
    assert before == {file: file.read_bytes() for file in before}
    assert {f.name for f in tmp_path.iterdir()} == {"ablation.csv", "fit.csv", "table.csv"}


def test_a_command_replaces_only_what_it_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("table", _ablation(tmp_path), "--rows", "precision", "--out", "new/t.json")
    for _ in range(2):
        assert _call(*command).exit_code == 0
    report = json.loads(Path("new/t.json").read_text())
    read = hashlib.sha256(Path("runs.csv").read_bytes()).hexdigest()
    assert report["input_sha256"] == read
    assert set(report["files"]) == {"t.csv", "t.tex"}
    assert not list(Path("new").glob(".*"))
    other = ("ablate", "runs.csv", "--baseline", "precision=bf16", "--out", "new/t.json")
    assert "new/t.csv exists and was not made by python -m analysis ablate" in refused(*other)
    Path("new/t.csv").write_text("my own notes\n")
    assert (
        "new/t.csv exists and was not made by python -m analysis table, or has changed since"
        in refused(*command)
    )
    Path("mine.json").write_text("{}\n")
    assert "mine.json exists and was not made by" in refused(*command[:-1], "mine.json")
    assert "would be two files" in refused(*command[:-1], "t.csv")
    assert "new exists and was not made by python" in refused(*command[:-1], "new")
    assert "runs.csv is not a folder" in refused(*command[:-1], "runs.csv/t.json")
    assert Path("new/t.csv").read_text() == "my own notes\n"


def test_a_forecast_that_exists_is_kept(tmp_path: Path, refused: Callable[..., str]) -> None:
    runs = _csv(tmp_path, grid(1e-3))
    command = ("forecast", runs, "--n", "n", "--d", "d", "--loss", "loss", "--at", "n=1,d=1")
    assert "a forecast is not overwritten" in refused(*command, "--out", runs)


WRONG = {
    "fit --delta 0": "--delta 0 must be a finite number above 0",
    "fit --delta nan": "--delta nan must be a finite number above 0",
    "fit --bootstrap 0": "--bootstrap 0 gives no interval",
    "fit --seed -1": "--seed -1 must be 0 or more",
    "fit --flops 1e20 --flops -1": "--flops -1 must be a finite number above 0",
    "fit --where bad": "--where 'bad': name 'bad' is not defined; there are: n, d, flops, seed",
    "fit --where seed": "--where 'seed' is neither true nor false",
    "fit --where seed==": "--where 'seed==': invalid syntax",
    "fit --where ((": "--where '((': ('EOF in multi-line statement'",
    "fit --where word<1": "word is 'one' in row 1 (and in 63 more) and must be a finite number",
    "fit --where my.key<1": "write `my.key` in backticks",
    "fit --where seed<0": "--where 'seed<0' leaves 0 of 64 rows",
    "fit --holdout bad": "--holdout 'bad': name 'bad' is not defined",
    "fit --loss word": "word is 'one' in row 1",
    "fit --loss endless": "endless is inf in row 3 and must be a finite number",
    "fit --n endless": "endless is inf in row 3",
    "fit --d n/zero": "n/zero is inf in row 1",
    "fit --n nn": "no column nn; there are: n, d",
    "fit --column q=n": "--column q: the law has no such column; it has n, d",
    "fit --law chincilla": "--law chincilla is none of chinchilla",
    "isoflop --loss endless": "endless is inf in row 3",
    "envelope --run seed --loss endless": "endless is inf in row 3",
    "envelope --run seed --where bad": "--where 'bad'",
    "table --metric loss": "give --rows COLUMN; columns with several values: n, d, flops",
    "ablate --metric loss": "give --baseline COLUMN=VALUE; columns with several values: n, d",
    "table --rows seed --metric word": "word is 'one' in row 1",
    "table --rows seed --metric endless": "endless is inf in row 3",
    "table --rows seed --cols seed --metric loss": "rows, columns and metric are seed, seed, loss",
    "table --rows seed --metric loss --where bad": "--where 'bad'",
    "ablate --baseline seed=0 --metric endless": "endless is inf in row 3",
    "ablate --baseline seed=7 --metric loss --pair n,d": "no run has seed=7",
    "ablate --baseline seed --metric loss": "--baseline seed must be column=value",
    "ablate --baseline loss=7 --metric loss": "--baseline loss=7 is of the metric",
    "forecast --at n=1e9,d=-1": "--at n=1e9,d=-1: d must be a finite number above 0",
    "forecast --at n=1e9,d=x": "d must be a finite number above 0",
    "forecast --at n=1e9": "--at n=1e9 must give n, d, each once",
    "forecast --at n=1e9,d=1,q=2": "must give n, d, each once",
    "design --keys n --target 0 --budget 1": "--target 0 must be a finite number above 0",
    "design --keys n --target 1 --budget inf": "--budget inf must be a finite number above 0",
}


@pytest.mark.parametrize("options", WRONG)
def test_what_is_wrong_is_one_line(
    options: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    table = grid(1e-3).assign(word="one", zero=0, **{"my.key": 1})
    table["endless"] = table["loss"].where(table.index != 2, float("inf"))
    command, *rest = options.split()
    names = {
        "table": [],
        "ablate": [],
        "isoflop": ["--n", "n", "--loss", "loss"],
        "envelope": ["--n", "n"],
    }.get(command, ["--n", "n", "--d", "d", "--loss", "loss"])
    out = ["--out", tmp_path / "out.json"]
    assert WRONG[options] in refused(command, _csv(tmp_path, table), *names, *out, *rest)
    assert [file.name for file in tmp_path.iterdir()] == ["runs.csv"], "a failure leaves files"


@pytest.mark.parametrize(
    "name", ["empty.csv", "binary.csv", "header.csv", "ragged.csv", "twice.csv", "no.parquet"]
)
def test_a_file_that_is_no_table_is_one_line(
    name: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    content = {"binary.csv": b"\xff\xfe\x00a", "header.csv": b"a,b\n", "ragged.csv": b"a\n1\n1,2\n"}
    content["twice.csv"] = b"a,b,a\n1,2,3\n"
    (tmp_path / name).write_bytes(content.get(name, b""))
    line = refused("table", tmp_path / name, "--rows", "a", "--out", tmp_path / "t.json")
    assert line.startswith(f"{tmp_path / name} "), line


def test_an_ablation_has_the_unpaired_comparison_beside_the_paired(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    done = _call("ablate", _ablation(tmp_path), "--baseline", "precision=bf16", "--out", out)
    assert done.exit_code == 0, done.output
    assert "unpaired (Welch)" in done.output
    report = json.loads(out.read_text())
    (paired,), (unpaired,) = report["differences"], report["unpaired_differences"]
    assert paired["difference"] == pytest.approx(unpaired["difference"])
    assert unpaired["low"] < paired["low"] < paired["high"] < unpaired["high"]
    assert report["doubts"] == [line for line in done.output.splitlines() if "too wide" in line]
    apart = ["--where", "(precision == 'bf16') == (seed < 3)", "--out", tmp_path / "c.json"]
    alone = _call("ablate", tmp_path / "runs.csv", "--baseline", "precision=bf16", *apart)
    assert "no run of nvfp4 has a partner equal in seed" in alone.output
    assert json.loads((tmp_path / "c.json").read_text())["doubts"] == []
    fewer = ["--where", "seed < 3", "--out", tmp_path / "b.json"]
    less = _call("ablate", tmp_path / "runs.csv", "--baseline", "precision=bf16", *fewer)
    assert "leaves 4 of 6 rows" in less.output
