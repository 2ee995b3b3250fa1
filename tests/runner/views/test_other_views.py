"""TensorBoard and W&B get every point once, whatever kills the uploader, and are read back."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.foreign import from_tables, from_tensorboard, from_wandb, write_tables
from analysis.runs import from_folders
from runner.records import journal
from runner.records.cells import Cell
from runner.views.other_views import ViewFeeder, is_behind
from tests.conftest import ROOT
from tests.mlflow_server import new_cells

Compose = Callable[..., dict[str, Any]]
READERS = {"tensorboard": from_tensorboard, "wandb": from_wandb}
# Points have been written, and the process dies before its cursor says so.
KILLED = """
import os, sys
from pathlib import Path
from runner.views import other_views
other_views.ViewCursor.write = lambda *_: os._exit(9)
feeder = other_views.ViewFeeder(Path(sys.argv[1]), sys.argv[2])
feeder.deliver("v")
feeder.close()
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's client writes files only, whoever runs the tests."""
    monkeypatch.setenv("WANDB_MODE", "offline")


def _begin(cell: Cell) -> journal.Journal:
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    return journal.Journal(cell.folder, attempt)


def _log(writer: journal.Journal, steps: range) -> None:
    for step in steps:
        writer.metrics(step, {"loss": 5.0 / (step + 1), "tokens": step * 64.0})


@pytest.mark.parametrize("view", ["tensorboard", pytest.param("wandb", marks=pytest.mark.slow)])
def test_a_view_has_each_point_once_though_its_uploader_is_killed(
    view: str, tmp_path: Path, compose: Compose
) -> None:
    first, second = new_cells(compose, "v", 2)
    writer = _begin(first)
    _log(writer, range(5))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), view], cwd=ROOT)
    assert killed.returncode == 9
    feeder = ViewFeeder(tmp_path, view)
    assert feeder.deliver("v") == 10
    _log(writer, range(5, 8))
    other = ViewFeeder(tmp_path, view)
    assert other.deliver("v") == 0  # the first one feeds the run
    feeder.close()
    assert other.deliver("v") == 6
    writer.event("finished")
    writer.close()
    last = _begin(second)
    _log(last, range(3))
    last.event("diverged")
    last.close()
    assert other.deliver("v") == 6
    other.close()
    assert not is_behind(tmp_path / "sweeps" / "v", view)
    shown = READERS[view](tmp_path / view)
    _assert_same(from_folders(tmp_path, "v").history, shown.history)
    assert sorted(shown.table["seed"].astype(float)) == [0.0, 1.0]
    assert set(shown.table["precision.compute"]) == {"fp32"}
    write_tables(shown, tmp_path / "imported" / "v")
    again = from_tables(tmp_path / "imported" / "v")
    pd.testing.assert_frame_equal(again.table, shown.table, check_dtype=False)
    assert again.table.attrs == shown.table.attrs


def _assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Assert that two histories have the same points, to single precision, as often."""
    columns = ["key", "step", "value"]
    plain = [
        h.assign(key=h["key"].astype(str))[columns].sort_values(columns, ignore_index=True)
        for h in (ours, theirs)
    ]
    pd.testing.assert_frame_equal(*plain, rtol=1e-6)
