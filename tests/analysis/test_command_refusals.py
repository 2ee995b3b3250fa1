"""What a command refuses is one line, and no file of somebody else's is overwritten."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.__main__ import main
from tests.analysis.calls import call, write_ablation, write_csv
from tests.analysis.known import grid


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


@pytest.mark.parametrize("kind", ["csv", "linked csv", "law", "shapes"])
def test_no_command_overwrites_its_input(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = write_ablation(tmp_path, "ablation.csv")
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
    command = ("table", write_ablation(tmp_path), "--rows", "precision", "--out", "new/t.json")
    for _ in range(2):
        assert call(*command).exit_code == 0
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
    runs = write_csv(tmp_path, grid(1e-3))
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
    assert WRONG[options] in refused(command, write_csv(tmp_path, table), *names, *out, *rest)
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
