"""Inputs from other runs: files, sets, live models; on the local pool, by the command line."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.runs import from_folders
from runner.data.corpus import source_weight
from runner.machine import storage
from runner.machine.errors import DataError
from runner.records import journal
from runner.records.cells import Cell, load_cell
from runner.records.inputs import InputConfig, changed_inputs, output_file, sha256
from runner.records.run_data import build_corpus
from runner.work.weigh import regress
from tests.command_server import run, start
from tests.conftest import TINY, write_text

_OF_STAGES = ("train.steps", "data=")  # a key of the command line would win over theirs
BASE = [a for a in TINY if not a.startswith(_OF_STAGES)]
MADE = (
    "hydra.sweeper.stages={pre:{params:{data:text,data.sources.0.path:'%s',train.steps:6}},"
    "gen:{from:{init:{stage:pre}},params:{work:make,work.documents:40,work.tokens:24}},"
    "ft:{from:{gen:{stage:gen}},params:{data:jsonl,data.sources.0.path:"
    "'input:gen/documents.jsonl',train.steps:4}}}"
)


def _made(root: Path, *more: str) -> list[str]:
    root.mkdir(exist_ok=True)
    text = write_text(root / "text.txt")
    return ["-m", *BASE, MADE % text, f"root={root}", "name=g", "hydra.launcher.jobs=1", *more]


def _cells(root: Path) -> dict[str, Cell]:
    """Return the cells of sweep g by what stands before the colon of their labels."""
    rows = storage.read_lines(root / "sweeps/g/cells.jsonl")
    cells = {row["label"]: load_cell(root / "runs" / row["fingerprint"]) for row in rows}
    return {label.partition(":")[0]: cell for label, cell in cells.items()}


def _events(cell: Cell, name: str) -> list[dict[str, Any]]:
    found = [e for attempt in journal.attempts(cell.folder) for e in journal.events(attempt)]
    return [event for event in found if event["event"] == name]


def _espalier(root: Path, *line: str) -> str:
    done = run("runner.commands.cli", *line, "--root", str(root))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root where a run was trained, wrote documents, and another was trained on them."""
    root = tmp_path_factory.mktemp("whole")
    done = run("runner", *_made(root))
    assert done.returncode == 0, done.stderr
    return root


def test_a_run_trains_on_what_another_made_and_notes_what_it_has_read(whole: Path) -> None:
    cells = _cells(whole)
    file = cells["gen"].folder / "outputs" / "documents.jsonl"
    assert len(storage.read_lines(file)) == 40
    (wrote,), (read,) = _events(cells["gen"], "wrote"), _events(cells["ft"], "read")
    assert wrote["sha256"] == read["sha256"] == sha256(file)
    assert read["run"] == cells["gen"].fingerprint
    assert changed_inputs(cells["ft"].folder) == []
    with pytest.raises(DataError, match=r"has the outputs: documents\.jsonl; name one as"):
        output_file("input:gen/other.jsonl", cells["ft"].inputs)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("input:gen/texts.jsonl", r"makes the files: documents\.jsonl; name one as"),
        ("input:pre", r"no input 'pre'; there are: gen"),
    ],
)
def test_a_file_that_no_input_makes_is_refused_before_anything_runs(
    reference: str, message: str, tmp_path: Path
) -> None:
    line = [a.replace("input:gen/documents.jsonl", reference) for a in _made(tmp_path)]
    done = run("runner", *line)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_a_changed_file_is_drift_and_another_attempt_refuses_it(tmp_path: Path) -> None:
    assert run("runner", *_made(tmp_path)).returncode == 0
    cells = _cells(tmp_path)
    file = cells["gen"].folder / "outputs" / "documents.jsonl"
    file.write_text(file.read_text() * 2)
    planned = run("runner", *_made(tmp_path, "hydra.sweeper.dry_run=true")).stdout
    assert "(1 drifted, 2 finished)" in planned
    assert f"input {cells['gen'].fingerprint}/documents.jsonl was" in " ".join(planned.split())
    assert "drifted" in run("runner", *_made(tmp_path)).stderr
    ft = cells["ft"]
    (journal.attempts(ft.folder)[-1] / "events.jsonl").rename(tmp_path / "kept")
    lines = storage.read_lines(tmp_path / "kept")
    for event in lines[:-1]:  # as if it had been killed at its last step
        storage.append_line(journal.attempts(ft.folder)[-1] / "events.jsonl", event)
    again = run("runner", *_made(tmp_path))
    assert again.returncode == 1
    assert "has changed since an earlier attempt read it" in (ft.folder / "log.txt").read_text()


@pytest.mark.slow
def test_a_killed_launcher_is_started_again_and_the_same_documents_come_out(
    whole: Path, tmp_path: Path
) -> None:
    launcher = start("runner", *_made(tmp_path))
    partial: list[Path] = []
    while launcher.poll() is None and not any(len(storage.read_lines(p)) >= 16 for p in partial):
        partial = list(tmp_path.glob("runs/*/outputs/.documents.jsonl"))
        time.sleep(0.005)
    (file,) = partial
    launcher.kill()
    os.kill(journal.lease(journal.attempts(file.parent.parent)[-1])["pid"], signal.SIGKILL)
    launcher.wait()
    gen = _cells(tmp_path)["gen"]
    while gen.state == "running":
        time.sleep(0.01)
    assert gen.state == "interrupted"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:11]) + lines[11][:5])  # a round is cut short, a line torn
    again = run("runner", *_made(tmp_path))
    assert again.returncode == 0, again.stderr
    assert "(1 finished, 1 interrupted, 1 new); 2 to run" in again.stderr
    one, two = (
        _cells(root)["gen"].folder / "outputs/documents.jsonl" for root in (whole, tmp_path)
    )
    assert one.read_bytes() == two.read_bytes()
    rows = storage.read_lines(gen.folder / "metrics.jsonl")
    assert {"restored": 11, "attempt": 2}.items() <= next(
        r for r in rows if "restored" in r
    ).items()


def test_what_shows_runs_shows_those_without_a_model(whole: Path) -> None:
    gen, ft = (_cells(whole)[name] for name in ("gen", "ft"))
    planned = run("runner", *_made(whole, "hydra.sweeper.dry_run=true")).stdout
    assert "3 finished" in planned
    assert "gen: make documents=40 tokens=24 " in planned  # and no word of a model
    assert _espalier(whole, "status", "g").count("finished") == 3
    assert Path(_espalier(whole, "report", "g").strip()).exists()
    assert "no cell of 3 failed" in _espalier(whole, "failures", "g")
    assert "output=documents.jsonl" in _espalier(whole, "show", gen.fingerprint)
    assert "nearest finished cell" in _espalier(whole, "why", gen.fingerprint)
    assert "model.width: (absent) | 24" in _espalier(whole, "diff", gen.fingerprint, ft.fingerprint)
    told = _espalier(whole, "eval", "g", "tasks=[lambada]", "--plan")
    assert "trains no model: left out" in told
    assert "2 cells (2 new)" in told  # also of the one that must read its file for it
    table = from_folders(whole, "g").table.set_index("fingerprint")
    assert table.loc[gen.fingerprint, "documents"] == 40
    assert (
        table.loc[gen.fingerprint, "num_parameters"] != table.loc[gen.fingerprint, "num_parameters"]
    )
    assert "points delivered" in _espalier(whole, "sync", "g")


MIX = (
    "hydra.sweeper.stages={proxy:{zip:[{data.sources.0.weight:[1,2,4,3],optim.lr:"
    "[1e-2,1e-2,1e-2,1e18]}],params:{train.steps:20,train.clip:null,schedule:constant}},"
    "mix:{from:{proxies:{stage:proxy,all:true}},params:{work:weigh,work.candidates:200,"
    "work.keep:10}},final:{from:{mix:{stage:mix}},params:{data.weights:"
    "'input:mix/weights.json',train.steps:2}}}"
)


def _two_sources(root: Path) -> list[str]:
    write_text(root / "text.txt")
    (root / "other.txt").write_text("".join(f"{i} comes before {i + 1}.\n" for i in range(300)))
    node = root / "conf" / "data" / "two.yaml"
    node.parent.mkdir(parents=True)
    files = "".join(f"  - {{path: {root / name}}}\n" for name in ("text.txt", "other.txt"))
    node.write_text(f"_target_: runner.data.tokens_config.DataConfig\nsources:\n{files}")
    chosen = [f"hydra.searchpath=[file://{root}/conf]", "data=two", f"root={root}", "name=g"]
    return ["-m", *BASE, *chosen]


def test_a_regression_says_null_of_what_its_runs_do_not_tell() -> None:
    mixtures = np.array([[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]])
    fit = regress(mixtures, mixtures @ [1.0, 3.0] + [0.0, 0.1, 0.0])
    assert fit["residual_sd"] > 0
    assert 0.9 < fit["r_squared"] < 1
    just_determined = regress(mixtures[:2], np.array([2.0, 2.0]))
    assert just_determined["coefficients"] == pytest.approx([2.0, 2.0])
    assert just_determined["residual_sd"] is just_determined["r_squared"] is None


@pytest.mark.slow
def test_weights_come_of_a_set_of_proxies_one_of_which_diverged(tmp_path: Path) -> None:
    done = run("runner", *_two_sources(tmp_path), MIX)
    assert done.returncode == 0, done.stderr
    cells = _cells(tmp_path)
    proxies = [load_cell(folder) for folder in cells["mix"].inputs["proxies"]]
    assert sorted(cell.state for cell in proxies) == ["diverged", *["finished"] * 3]
    found = json.loads((cells["mix"].folder / "outputs" / "regression.json").read_text())
    assert (len(found["proxies"]), found["left_out"]) == (3, 1)
    weights = json.loads((cells["mix"].folder / "outputs" / "weights.json").read_text())
    final = cells["final"]
    hashes = [source["content"] for source in final.science["data.sources"]]
    corpus = build_corpus(final.config, final.inputs, hashes, None)
    assert corpus.weights == pytest.approx(weights)
    assert weights == pytest.approx(found["weights"])
    assert sum(weights) == pytest.approx(1.0)
    assert [source_weight(source) for source in final.config.data.sources] == [1.0, 1.0]
    assert _events(final, "read")[0]["output"] == "weights.json"


def test_a_failed_member_blocks_a_set_and_is_named(tmp_path: Path) -> None:
    bad = (
        "hydra.sweeper.stages={proxy:{params:{model._target_:tests.faults.FaultyConfig,"
        "model.fault:'none,raise',train.steps:2}},"
        "mix:{from:{proxies:{stage:proxy,all:true}},params:{work:weigh}}}"
    )
    done = run("runner", *_two_sources(tmp_path), bad)
    assert done.returncode == 1
    mix = _cells(tmp_path)["mix"]
    assert mix.state == "new"
    failed = next(r for r in mix.inputs["proxies"] if journal.state(r) == "failed")
    assert f"waits for {failed.name[:6]}, which is failed" in " ".join(done.stderr.split())


def test_a_set_waits_for_ends_a_single_input_for_a_finish_and_a_live_one_for_nothing(
    tmp_path: Path,
) -> None:
    for name, end in (("a", "finished"), ("b", "diverged"), ("c", "failed"), ("d", None)):
        (tmp_path / name).mkdir()
        if journal.claim(tmp_path / name) is not None and end is not None:
            journal.record_end(tmp_path / name, end)
    everyone = ("d", "c", "b", "a", "new")
    assert InputConfig(runs=everyone, all=True).pending(tmp_path) == ["c", "d", "new"]
    pending = {run: InputConfig(runs=(run,)).pending(tmp_path) for run in everyone}
    assert pending == {run: [] if run == "a" else [run] for run in everyone}
    assert InputConfig(runs=("new",), live=True).pending(tmp_path) == []


@pytest.mark.slow
def test_a_live_input_is_followed_while_it_trains(tmp_path: Path, text: Path) -> None:
    stages = (
        "hydra.sweeper.stages={pre:{params:{model._target_:tests.faults.FaultyConfig,"
        "model.fault:slow,train.steps:40,train.checkpoint.every_steps:4}},"
        "ev:{from:pre,live:true,params:{work:evaluate,model._target_:tests.faults.FaultyConfig,"
        "model.fault:slow}}}"
    )
    given = [f"data.sources.0.path={text}", f"root={tmp_path}", "name=g", "hydra.launcher.jobs=2"]
    done = run("runner", "-m", *BASE, "data=text", *given, stages)
    assert done.returncode == 0, done.stderr
    pre, ev = (_cells(tmp_path)[name] for name in ("pre", "ev"))
    rows = storage.read_lines(ev.folder / "metrics.jsonl")
    judged = [row for row in rows if "val_loss" in row]
    (ended,) = _events(pre, "finished")
    assert judged[0]["time"] < ended["time"]
    assert judged[-1]["step"] == 40
