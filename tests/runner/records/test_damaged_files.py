"""Whatever a file of a root holds, each verb that reads it shows the rest or names the file."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from analysis.outputs import Outputs
from analysis.runs import from_folders
from runner.commands.cli import app
from runner.launch.backends import last_backend
from runner.launch.policy import load_policy
from runner.launch.study_config import read_study
from runner.machine.errors import EspalierError
from runner.records import metrics
from runner.records.budget import read_budget
from runner.records.cells import freeze_cell, join_sweep, load_cell, make_cells
from runner.records.drift import drift
from runner.records.slurm_queue import submissions
from runner.views.mlflow_cursors import Cursor, recorded_store
from runner.views.mlflow_points import PointReader
from runner.views.speed import precision_key, speeds
from runner.views.sweep_story import read_story
from tests.conftest import compose_tiny, write_text
from tests.run_folders import DONE, Holder, row

_COMMAND = get_command(app)
_STORE = "http://127.0.0.1:1"
_FAILED = Holder(("started", "failed"))
_VERBS = [
    ["status", "s"],
    ["ls"],
    ["show", "RUN"],
    ["why", "RUN"],
    ["diff", "RUN", "OTHER"],
    ["logs", "RUN"],
    ["failures", "s"],
    ["report", "s"],
    ["gc"],
    ["du"],
    ["pack", "s", "--out", "OUT"],
    ["retry", "s", "--class", "disk"],
    ["cancel", "s"],
]


def _write(root: Path) -> Path:
    """Write a sweep of two cells, of which one has finished and one failed; return its run."""
    text = write_text(root / "text.txt")
    points = [(f"seed={s}", compose_tiny(root, text, f"seed={s}", "name=s")) for s in (1, 2)]
    cells = make_cells(points, [{"model": "gpt_pico"}] * 2)
    for cell in cells:
        freeze_cell(cell)
    join_sweep("s", cells)
    run, sweep = cells[0].folder, cells[0].sweep
    for cell, holder in zip(cells, (DONE, _FAILED), strict=True):
        holder.write(cell.folder / "attempts/0001")
        (cell.folder / "metrics.jsonl").write_text(row(1, 1, 3.0) + row(1, 2, 2.5))
        (cell.folder / "log.txt").write_text("step 1\n")
    score = {"name": "t/acc", "task": "t", "metric": "acc", "value": 0.5, "stderr": None, "n": 4}
    score |= {"version": 1, "prompt_hash": "a", "num_fewshot": 0, "lm_eval": "0.4"}
    sizes = ("steps", "vocab_size", "num_parameters", "num_active_parameters")
    files = {
        run / "summary.json": dict.fromkeys((*sizes, "num_embedding_parameters"), 2)
        | {"tokens": 128, "flops": 10},
        run / "attempts/0001/environment.json": {
            "git_sha": "0" * 40,
            "torch": "2.0",
            "cpu": "x",
            "gpus": [],
            "measure": ["val_loss", "min"],
        },
        run / "attempts/0001/code.json": {"models.layers": "0 0"},
        run / "evals/0.json": {"step": 2, "values": {"norm": 1.0}, "scores": [score]},
        Cursor(run, "s", _STORE).file: {"experiment": "1", "run_id": "a" * 32, "sent": 0},
        run / "adopted.json": {"from": "b", "reason": "c"},
        sweep / "mlflow.json": {"uri": _STORE},
        sweep / "submissions/00000001.json": {"job": "1", "tasks": [[run.name]], "at_once": None},
        sweep / "study.json": {
            "latest": "a",
            "studies": {"a": {"study": {}, "base": {}, "log_name": "a"}},
        },
        sweep / "launcher.json": {"launcher": "local", "jobs": 1},
        sweep / "policy.json": {"max_alike": 5},
        sweep / "story.json": {"question": "a", "verdict": "b"},
        root / "plots/s/made.json": {"made_by": "espalier plots", "files": {}, "earlier": {}},
    }
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content) + "\n")
    return run


def _idle_scheduler(folder: Path) -> Path:
    """Write a squeue that lists no job; return its folder."""
    folder.mkdir()
    (folder / "squeue").write_text("#!/bin/sh\n")
    (folder / "squeue").chmod(0o755)
    return folder


def _damages(content: bytes) -> Iterator[bytes]:
    """Yield what a disk, another program or an editor makes of a file of JSON."""
    yield from (b"null\n", b"{}\n", b"{\n", b"\xff\n")
    first, _, rest = content.partition(b"\n")
    try:
        record = json.loads(first)
    except ValueError:  # written over several lines
        record, rest = json.loads(content), b""
    for key in record:
        for value in (None, [5]):
            yield json.dumps(record | {key: value}).encode() + b"\n" + rest
        yield json.dumps({k: v for k, v in record.items() if k != key}).encode() + b"\n" + rest


def _verb(root: Path, run: Path, *words: str) -> Callable[[], Any]:
    """Return a call of a verb of the command line."""
    other = next(folder for folder in sorted(run.parent.iterdir()) if folder != run)
    out = root / "out.tar"
    named = {"RUN": str(run), "OTHER": str(other), "OUT": str(out)}
    line = [named.get(word, word) for word in words]

    def call() -> None:
        out.unlink(missing_ok=True)
        (run / "cancel").unlink(missing_ok=True)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            _COMMAND.main([*line, "--root", str(root)], standalone_mode=False)

    return call


def _readers(root: Path, run: Path) -> dict[str, Callable[[], Any]]:
    """Return the readers below the verbs that start a launcher, a figure or a store."""
    sweep = root / "sweeps/s"
    key = (precision_key(load_cell(run).science), "x")
    return {
        "analysis": lambda: from_folders(root, "s", cache=False),
        "plots": lambda: Outputs(root / "plots/s/made.json", "espalier plots").made(),
        "points": lambda: PointReader(run).read(),
        "scores": lambda: list(PointReader(run).scores()),
        "behind": lambda: Cursor(run, "s", _STORE).is_behind(),
        "store": lambda: recorded_store(root, "s"),
        "speeds": lambda: speeds(root, [key]),
        "drift": lambda: drift(run),
        "budget": lambda: read_budget(run / "summary.json"),
        "latest": lambda: metrics.latest(run, "loss"),
        "backend": lambda: last_backend(sweep, None),
        "policy": lambda: load_policy(sweep),
        "study": lambda: read_study(sweep),
        "submissions": lambda: submissions(root, "s"),
        "story": lambda: read_story(root, "s"),
    }


class _Opened:
    """The files that this process opens while `names` is a set; Python keeps an audit hook."""

    names: set[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.names is not None:
            self.names.add(str(arguments[0]))

    def by(self, read: Callable[[], Any]) -> set[str]:
        """Return the files that `read` opens."""
        self.names = names = set[str]()
        read()
        self.names = None
        return names


def test_a_damaged_file_is_named_and_hides_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(_idle_scheduler(tmp_path / "bin")), prepend=":")
    run = _write(tmp_path)
    readers = _readers(tmp_path, run)
    readers |= {verb[0]: _verb(tmp_path, run, *verb) for verb in _VERBS}
    opened = _Opened()
    sys.addaudithook(opened)
    reads = {name: opened.by(read) for name, read in readers.items()}
    files = [*run.rglob("*.json*"), *tmp_path.glob("sweeps/s/**/*.json*")]
    files += tmp_path.glob("plots/s/*.json")
    unread = [str(f) for f in files if not any(str(f) in names for names in reads.values())]
    assert not unread
    for file in files:
        content = file.read_bytes()
        for damaged in _damages(content):
            file.write_bytes(damaged)
            for name in (name for name in readers if str(file) in reads[name]):
                message = _refusal(readers[name], f"{name} on {file}: {damaged[:200]!r}")
                assert message is None or file.name in message, (name, damaged)
        file.write_bytes(content)


def _refusal(read: Callable[[], Any], what: str) -> str | None:
    """Return the message with which `read` refuses to go on, None if it does."""
    try:
        read()
    except (EspalierError, ValueError) as error:
        return str(error)
    except Exception as error:
        raise AssertionError(what) from error
    return None
