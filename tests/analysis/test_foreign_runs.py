"""Runs of CSV files and MLflow stores as tables that every command of analysis reads."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.foreign import from_csv, from_tables, write_tables
from analysis.source import read_source
from tests.command_server import run

STEPS = """run,width,lr,step,loss,grad
a,64,1e-3,0,5.0,1.0
a,64,1e-3,10,3.0,
b,128,1e-3,0,4.5,2.0
b,128,1e-3,10,2.5,0.5
"""


def test_a_csv_of_steps_is_runs_with_histories(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(STEPS)
    runs = from_csv(tmp_path / "log.csv", run="run", step="step")
    assert list(runs.table["label"]) == ["a", "b"]
    assert list(runs.table["width"]) == [64, 128]
    assert list(runs.table["loss"]) == [3.0, 2.5]  # the last values
    assert list(runs.table["grad"]) == [1.0, 0.5]
    assert runs.table.attrs["settings"] == ("lr", "width")
    loss = runs.curves("loss", "step")
    assert list(loss["value"]) == [5.0, 3.0, 4.5, 2.5]
    write_tables(runs, tmp_path / "t")
    again = from_tables(tmp_path / "t")
    pd.testing.assert_frame_equal(again.table, runs.table, check_dtype=False)
    pd.testing.assert_frame_equal(again.history, runs.history, check_dtype=False)
    with pytest.raises(KeyError, match="no column 'epoch'; there are: run, width"):
        from_csv(tmp_path / "log.csv", run="run", step="epoch")


def test_columns_of_several_kinds_are_kept_as_text(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("model,tags,val_loss\nx,1,2.5\ny,one,\n")
    runs = from_csv(tmp_path / "runs.csv")
    runs.table["mixed"] = [["p"], 3]
    write_tables(runs, tmp_path / "t")
    table = from_tables(tmp_path / "t").table
    assert list(table["mixed"]) == ['["p"]', "3"]
    assert np.isnan(table["val_loss"][1])


def test_imported_runs_are_a_table_for_every_command(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(STEPS)
    steps = ["--run", "run", "--step", "step"]
    imported = run("runner.commands.cli", "import", "runs", "csv", "log.csv", *steps, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    assert "imported/log: 2 cells: 2 finished; 2 metrics, 7 points" in imported.stdout
    assert len(read_source(tmp_path / "imported" / "log").table) == 2
    again = run("runner.commands.cli", "import", "runs", "csv", "log.csv", cwd=tmp_path)
    assert "imported/log exists; choose another --out" in again.stderr
