"""A cell that cannot be read takes no other one with it: it is a row that says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from runner.commands.cli import app
from runner.machine.errors import ConfigError
from runner.records.adopt import adopt
from runner.records.cells import Cell, freeze_cell, join_sweep, make_cells, members
from runner.records.sweep_cells import sweep_cells
from runner.views.plan import plan


def _cli(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    return done.exit_code, done.output


def _class_is_gone(cell: Cell) -> None:
    file = cell.folder / "cell.json"
    record = json.loads(file.read_text())
    record["config"]["schedule"]["_target_"] = "mylab.gone.ScheduleConfig"
    file.write_text(json.dumps(record))


def _damaged(cell: Cell) -> None:
    (cell.folder / "cell.json").write_text("{")


def _missing(cell: Cell) -> None:
    (cell.folder / "cell.json").unlink()


def _no_object(cell: Cell) -> None:
    (cell.folder / "cell.json").write_text("[]")


def _write_journal(cell: Cell, events: str) -> None:
    attempt = cell.folder / "attempts/0001"
    attempt.mkdir(parents=True)
    (attempt / "lease.json").write_text("{}")
    (attempt / "events.jsonl").write_text(events)


def _no_journal(cell: Cell) -> None:
    _write_journal(cell, "5\n")


def _no_summary(cell: Cell) -> None:
    _write_journal(cell, '{"event": "finished", "time": 0}\n')
    (cell.folder / "summary.json").write_text("[]")


@pytest.mark.parametrize("spoil", [_no_object, _no_journal, _no_summary])
def test_a_damaged_record_is_a_row_of_the_status(
    spoil: Callable[[Cell], None], compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    cells = make_cells([("one", compose("seed=1")), ("two", compose("seed=2"))])
    for cell in cells:
        freeze_cell(cell)
    join_sweep("default", cells)
    spoil(cells[0])
    code, text = _cli("status", "default", "--root", str(tmp_path))
    assert code == 0
    assert "not a JSON object" in text
    assert "two" in text


def test_a_sweep_without_members_is_not_offered(tmp_path: Path) -> None:
    (tmp_path / "sweeps/begun").mkdir(parents=True)
    with pytest.raises(ConfigError, match="there are: none yet"):
        members(tmp_path, "begun")


@pytest.mark.parametrize("spoil", [_class_is_gone, _damaged, _missing])
def test_the_rest_of_its_sweep_is_shown_and_retried(
    spoil: Callable[[Cell], None], compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    cells = make_cells([("one", compose("seed=1")), ("two", compose("seed=2"))])
    for cell in cells:
        freeze_cell(cell)
    join_sweep("default", cells)
    spoil(cells[0])
    reason = {"_class_is_gone": "mylab", "_damaged": "Expecting", "_missing": "No such file"}
    code, text = _cli("status", "default", "--root", str(tmp_path))
    assert code == 0
    assert "unreadable" in text
    assert reason[spoil.__name__] in text
    assert "new" in text
    code, _ = _cli("report", "default", "--root", str(tmp_path))
    page = (tmp_path / "sweeps/default/report.html").read_text()
    assert code == 0
    assert reason[spoil.__name__] in page
    assert page.count("<tr>") == 3
    code, text = _cli("retry", "default", "--root", str(tmp_path))
    assert code == 0
    assert "nothing to retry" in text
    assert [cell.label for cell in sweep_cells(tmp_path, "default")] == ["two"]


def test_a_run_whose_class_is_gone_can_be_adopted(compose: Callable[..., dict[str, Any]]) -> None:
    old, new = make_cells([("old", compose("seed=1")), ("new", compose("seed=1", "optim.lr=1e-2"))])
    freeze_cell(old)
    _class_is_gone(old)
    cell, keys = adopt([new], old.fingerprint, "the schedule was renamed")
    assert cell.fingerprint == new.fingerprint
    assert list(keys) == ["optim.lr"]


def test_the_plan_names_runs_of_before_samples_counted(
    compose: Callable[..., dict[str, Any]],
) -> None:
    given = ("precision=fp8_current", "model.width=32", "train.micro_batch=2")
    (cell,) = make_cells([("fp8", compose(*given))])
    kept = {k: v for k, v in cell.science.items() if k != "train.samples_per_forward"}
    from runner.records.fingerprint import fingerprint

    lease = cell.folder.parent / fingerprint(kept) / "attempts/0001/lease.json"
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"host": "node1", "pid": 1, "process_start": 0.0}))
    lines = [line for line in plan([cell], time_limited=False) if isinstance(line, str)]
    assert any(f"ran as {fingerprint(kept)}" in line for line in lines)
