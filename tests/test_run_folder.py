"""All readers of a run follow docs/run-folder.md: each reads the same folders, written by hand."""

import io
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from analysis.runs import Runs, from_folders
from analysis.stores import from_mlflow
from runner.grid.language import Axis
from runner.launch.single import _print_metrics
from runner.launch.study import Study, StudyConfig
from runner.machine.errors import DataError, StorageError
from runner.records import metrics
from runner.records.cells import Cell, freeze_cell, join_sweep, make_cells
from runner.records.new_checkpoints import last_evaluated
from runner.records.sweep_cells import sweep_cells
from runner.views.describe import describe
from runner.views.mlflow import Uploader, embedded_uri, sync
from runner.views.report import write_status_page
from runner.views.table import LiveTable
from tests.conftest import compose_tiny, write_text
from tests.run_folders import DONE, ENDED, Holder, restored, row

NAN, INF = math.nan, math.inf
Points = dict[tuple[str, int], float]  # (key, step): value


@dataclass(frozen=True)
class Case:
    """A run folder and what it says."""

    text: str
    losses: dict[int, float]
    holders: tuple[Holder, ...] = (ENDED, DONE)
    state: str = "finished"


FIRST = "".join(row(1, step, 5 - step / 10) for step in (10, 20, 30, 40))
TAKEN_OVER = FIRST + restored(2, 20)
LATE = row(1, 50, 99.0)
TWO = {10: 4.0, 20: 3.0}
LONG = "".join(
    row(2, step, 1 / step, val_loss=2.0) if step == 41 else row(2, step, 1 / step)
    for step in range(41, 400)
)
LINES = {
    "a worker taken for dead writes on": Case(TAKEN_OVER + LATE, TWO),
    "its successor too": Case(TAKEN_OVER + LATE + row(2, 30, 2.5) + LATE, TWO | {30: 2.5}),
    "torn last line": Case(
        FIRST + restored(2, 30) + row(2, 40, 1.5) + '{"step": 50, "lo',
        {10: 4.0, 20: 3.0, 30: 2.0, 40: 1.5},
    ),
    "restored twice": Case(
        TAKEN_OVER
        + row(2, 30, 2.5)
        + row(2, 40, 2.4)
        + restored(3, 30)
        + row(2, 50, 99.0)
        + row(3, 40, 2.3),
        TWO | {30: 2.5, 40: 2.3},
        (ENDED, ENDED, DONE),
    ),
    "restored to a step before that of the one before": Case(
        TAKEN_OVER + row(2, 30, 2.5) + restored(3, 10) + row(3, 20, 2.4),
        {10: 4.0, 20: 2.4},
        (ENDED, ENDED, DONE),
    ),
    "restored to 0": Case(FIRST + restored(2, 0) + row(2, 10, 9.0), {10: 9.0}),
    "restored to 0, nothing written since": Case(FIRST + restored(2, 0), {}),
    "late lines before the first row of the successor": Case(
        FIRST + restored(2, 40) + LATE * 200 + row(2, 50, 1.0),
        {10: 4.0, 20: 3.0, 30: 2.0, 40: 1.0, 50: 1.0},
    ),
    "late lines before its successor's first": Case(FIRST + LATE + restored(2, 20), TWO),
    "late restored": Case(
        TAKEN_OVER + row(2, 30, 2.5) + restored(1, 0) + row(2, 40, 2.4), TWO | {30: 2.5, 40: 2.4}
    ),
    "an attempt that wrote nothing": Case(FIRST, TWO | {30: 2.0, 40: 1.0}),
    "a step written twice": Case(
        FIRST + restored(2, 40) + row(2, 40, 1.5), TWO | {30: 2.0, 40: 1.5}
    ),
    "NaN and infinity": Case(
        row(1, 10, 4.0) + row(1, 20, INF) + row(1, 30, NAN),
        {10: 4.0, 20: INF, 30: NAN},
        (Holder(("started", "diverged")),),
        "diverged",
    ),
    "one row": Case(row(1, 10, 4.0), {10: 4.0}, (DONE,)),
    "no file": Case("", {}, (DONE,)),
    "longer than the tail": Case(
        FIRST + restored(2, 40) + LONG + LATE,
        TWO | {30: 2.0, 40: 1.0} | {step: 1 / step for step in range(41, 400)},
    ),
}
HOLDERS = {
    "dead on this host": ((Holder(("started",)),), "interrupted"),
    "its pid is another's": ((Holder(("started",), process="later"),), "interrupted"),
    "alive on this host": ((Holder(("started",), process="this"),), "running"),
    "silent on another host": ((Holder(("started",), "elsewhere", beat_s=600.0),), "interrupted"),
    "heard from on another host": ((Holder(("started",), "elsewhere", beat_s=30.0),), "running"),
    "another host, no heartbeat yet": ((Holder((), "elsewhere"),), "running"),
    "claimed after an interruption": ((ENDED, Holder(process="this")), "running"),
    "dead before its first event": ((ENDED, Holder()), "interrupted"),
    "failed": ((ENDED, Holder(("started", "failed"))), "failed"),
    "started again in one attempt": ((Holder(("failed", "started", "finished")),), "finished"),
    "needs another leg": ((Holder(("started", "interrupted", "needs_resubmit")),), "interrupted"),
    "nobody": ((), "new"),
}
LAST_VAL = {"longer than the tail": ["2.000"]}
CASES = LINES | {
    name: Case(
        FIRST if who else "", {10: 4.0, 20: 3.0, 30: 2.0, 40: 1.0} if who else {}, who, state
    )
    for name, (who, state) in HOLDERS.items()
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a sweep of one cell for each case."""
    folder = tmp_path_factory.mktemp("root")
    node = compose_tiny(folder, write_text(folder / "text.txt"), "name=s")
    cells = make_cells((name, {**node, "seed": seed}) for seed, name in enumerate(CASES))
    join_sweep("s", cells)
    for cell, case in zip(cells, CASES.values(), strict=True):
        freeze_cell(cell)
        write_run(cell, case)
    return folder


def write_run(cell: Cell, case: Case) -> None:
    """Write what the attempts of a case left behind."""
    for number, holder in enumerate(case.holders, 1):
        holder.write(cell.folder / "attempts" / f"{number:04d}")
    if case.text:
        (cell.folder / "metrics.jsonl").write_text(case.text)


@pytest.fixture(scope="module")
def cells(root: Path) -> dict[str, Cell]:
    """The frozen cells by their cases' names."""
    return {cell.label: cell for cell in sweep_cells(root, "s")}


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    """What analysis reads."""
    return from_folders(root, "s", cache=False)


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture
def cell(cells: dict[str, Cell], name: str) -> Cell:
    return cells[name]


def same(values: dict[Any, float], expected: dict[Any, float]) -> bool:
    """Return whether both have the same items in the same order; NaN equals NaN."""
    return repr(list(values.items())) == repr(list(expected.items()))


def latest(losses: dict[int, float]) -> dict[str, float]:
    """Return the last step and loss."""
    return {} if not losses else {"step": max(losses), "loss": losses[max(losses)]}


def test_the_runner_reads_what_counts(cell: Cell, case: Case) -> None:
    rows = metrics.read(cell.folder)
    assert same({r["step"]: r["loss"] for r in rows}, case.losses)
    assert same(metrics.latest(cell.folder, "step", "loss"), latest(case.losses))


def test_analysis_reads_the_same(runs: Runs, cell: Cell, case: Case) -> None:
    mine = runs.history[
        (runs.history["fingerprint"] == cell.fingerprint) & (runs.history["key"] == "loss")
    ]
    losses = dict(zip(mine["step"].tolist(), mine["value"].tolist(), strict=True))
    assert same(losses, case.losses)


def test_both_agree_on_the_state(runs: Runs, cell: Cell, case: Case) -> None:
    theirs = runs.table.set_index("fingerprint").loc[cell.fingerprint, "state"]
    assert (cell.state, theirs) == (case.state, case.state)


def test_the_table_shows_the_last_row_that_counts(cell: Cell, case: Case) -> None:
    stream = io.StringIO()
    Console(file=stream, width=200).print(LiveTable([cell]).render())
    last = latest(case.losses)
    shown = stream.getvalue().splitlines()[1].removeprefix(cell.label).split()
    assert shown[1:3] == [case.state, f"{last.get('step', 0)}/?"]
    assert shown[3:] == ([f"{last['loss']:.3f}"] if last else []) + LAST_VAL.get(cell.label, [])


def test_the_sparkline_goes_through_what_counts(cell: Cell, case: Case, tmp_path: Path) -> None:
    write_status_page([cell], "s", tmp_path / "page.html", "http://127.0.0.1:5000", [])
    page = (tmp_path / "page.html").read_text()
    finite = {step: loss for step, loss in case.losses.items() if math.isfinite(loss)}
    titles = re.findall(r"<title>(\S+) to (\S+)</title>", page)
    if len(finite) < 2:
        assert not titles
    else:
        assert titles == [(f"{max(finite.values()):.3f}", f"{min(finite.values()):.3f}")]
    if 2 <= len(finite) < 60:
        (line,) = re.findall(r'points="(.*?)"', page)
        assert len(re.findall(r"[\d.]+,[\d.]+", line)) == len(finite)


def test_a_study_is_told_the_last_value_that_counts(cell: Cell, case: Case, tmp_path: Path) -> None:
    cfg = StudyConfig(metric="loss", space={"optim.lr": Axis(low=1e-4, high=1e-1)})
    study = Study(tmp_path / "sweeps" / "o", cfg, {})
    trial = study.study.ask()
    trial.set_user_attr("fingerprint", cell.fingerprint)
    study.should_stop(cell)
    (seen,) = study.study.get_trials()
    assert same(seen.intermediate_values, case.losses)
    if case.state == "finished" and case.losses:
        assert study.record_outcome(cell)
        assert study.study.get_trials()[0].value == latest(case.losses)["loss"]


def test_an_evaluation_goes_on_after_the_last_row_that_counts(cell: Cell, case: Case) -> None:
    text = case.text.replace('"loss"', '"val_tokens"')
    folder = cell.folder.parent / f"of {cell.fingerprint}"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)
    assert last_evaluated(folder) == max(case.losses, default=0)


def test_show_prints_the_last_row_that_counts(cell: Cell, case: Case) -> None:
    *_, line = describe(cell.folder)
    shown = {key: float(value) for key, value in (part.split("=") for part in line.split())}
    shown.pop("val_loss", None)
    expected = {key: float(f"{value:.6g}") for key, value in latest(case.losses).items()}
    assert same(shown, expected)


def test_a_store_that_is_filled_at_once_has_what_counts(root: Path, runs: Runs) -> None:
    sync(root, ["s"], None)
    store = from_mlflow(embedded_uri(root), "s")
    stands = ["fingerprint", "key", "step"]
    ours, theirs = (
        r.history.astype({"fingerprint": str, "key": str}).sort_values(stands)
        for r in (runs, store)
    )
    assert ours[stands].to_numpy().tolist() == theirs[stands].to_numpy().tolist()
    assert repr(ours["value"].tolist()) == repr(theirs["value"].tolist())
    states = [r.table.set_index("label")["state"].to_dict() for r in (runs, store)]
    del states[0]["nobody"]  # MLflow learns of a run when it begins,
    states = [
        {k: "failed" if v == "diverged" else v for k, v in s.items()} for s in states
    ]  # by a tag
    assert states[0] == states[1]


def test_a_store_keeps_what_it_has_and_is_told_that_it_does_not_count(tmp_path: Path) -> None:
    """Each part is delivered by a process of its own, which knows the cursor alone."""
    node = compose_tiny(tmp_path, write_text(tmp_path / "text.txt"), "name=s")
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    join_sweep("s", [cell])
    write_run(cell, Case("", {}, (ENDED, Holder(process="this"))))
    # What is taken back before it is delivered (step 45) the store never sees.
    parts = [
        (FIRST, 4, None),
        (row(1, 45, 0.5) + restored(2, 20), 0, "2"),
        (LATE + row(2, 30, 2.0), 0, "1"),
        (row(2, 40, 1.5) + row(2, 45, 0.4), 1, "1"),
        (row(2, 50, 0.2), 1, "1"),
    ]
    for text, sent, superseded in parts:
        with open(cell.folder / "metrics.jsonl", "a") as stream:
            stream.write(text)
        uploader = Uploader(tmp_path, None)
        assert uploader.deliver("s") == sent
        (run,) = uploader.client.search_runs(["1"])
        assert run.data.tags.get("superseded_points") == superseded
    points = uploader.client.get_metric_history(run.info.run_id, "loss")
    values = [(p.step, p.value, p.timestamp) for p in points]
    assert values == [
        (10, 4.0, 110_000),
        (20, 3.0, 120_000),
        (30, 2.0, 130_000),
        (40, 1.0, 140_000),
        (45, 0.4, 245_000),
        (50, 0.2, 250_000),
    ]


class Pause(threading.Event):
    """The printer's wait: during the first one the file grows, during the second the run ends."""

    def __init__(self, file: Path, more: str) -> None:
        super().__init__()
        self.file, self.more = file, more

    def wait(self, timeout: float | None = None) -> bool:
        """Write what is left to write; True once nothing is."""
        with open(self.file, "a") as stream:
            stream.write(self.more)
        ended, self.more = not self.more, ""
        return ended


def test_a_single_run_prints_rows_that_count_as_they_come(
    cells: dict[str, Cell], tmp_path: Path
) -> None:
    cell = cells["one row"]
    alone = replace(cell, config=replace(cell.config, root=str(tmp_path)))
    alone.folder.mkdir(parents=True)
    file, stream = alone.folder / "metrics.jsonl", io.StringIO()
    file.write_text(FIRST)
    asked = {"x/accuracy": 0.5, "x/accuracy_stderr": 0.25, "x/log_loss": 1.0, "eval_s": 2.0}
    evaluated = json.dumps({"step": 30, "time": 9.0, "attempt": 2, "val_loss": 2.0} | asked)
    pause = Pause(file, restored(2, 20) + LATE + row(2, 30, 2.5) + f"{evaluated}\n")
    _print_metrics(alone, Console(file=stream, width=80), pause)
    shown = "".join(f"{line.strip()}\n" for line in stream.getvalue().splitlines())
    assert shown == (
        "step 30/?  loss 2.5000\nstep 30/?  val_loss 2.0000\n"
        "x/accuracy 0.5000 +- 0.2500\nx/log_loss 1.0000\n"
    )


BROKEN = FIRST + '{"step": 50, "lo{"step": 60, "time": 1, "attempt": 1, "loss": 2}\n' + LATE


def test_a_line_that_is_not_json_is_named(cells: dict[str, Cell], tmp_path: Path) -> None:
    both = [
        replace(c, config=replace(c.config, root=str(tmp_path)))
        for c in (cells["torn last line"], cells["one row"])
    ]
    join_sweep("s", both)
    for cell in both:
        freeze_cell(cell)
        write_run(cell, CASES[cell.label])
    file = both[0].folder / "metrics.jsonl"
    file.write_text(BROKEN)
    message = re.escape(f"{file}, line 5 holds ")
    readers: list[Callable[[], object]] = [
        lambda: metrics.read(both[0].folder),
        lambda: metrics.latest(both[0].folder, "loss"),
        lambda: list(describe(both[0].folder)),
        lambda: sync(tmp_path, ["s"], None),
    ]
    for reader in readers:
        with pytest.raises((DataError, StorageError), match=message):
            reader()
    with pytest.raises(ValueError, match=message):
        from_folders(tmp_path, "s", cache=False)
    stream = io.StringIO()
    Console(file=stream, width=500).print(LiveTable(both).render())
    write_status_page(both, "s", tmp_path / "page.html", "", [])
    for shown in (stream.getvalue(), (tmp_path / "page.html").read_text()):
        assert f"{file}, line 5 holds " in shown
        assert "finished" in shown  # the other cell
