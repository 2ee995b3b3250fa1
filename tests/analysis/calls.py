"""Calls of the commands of analysis, and tables as files to call them on."""

from pathlib import Path

import pandas as pd
from click.testing import Result
from typer.testing import CliRunner

from analysis.__main__ import app


def call(*arguments: object) -> Result:
    """Return the result of `python -m analysis` with these arguments."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write_csv(folder: Path, table: pd.DataFrame) -> Path:
    """Write a table as runs.csv; return the file."""
    file = folder / "runs.csv"
    table.to_csv(file, index=False)
    return file


def write_ablation(folder: Path, name: str = "runs.csv") -> Path:
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
