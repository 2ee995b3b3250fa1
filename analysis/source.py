"""The table that a command reads: CSV, parquet, or the finished runs of a sweep's folder."""

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from analysis.expressions import numbers, true_rows
from analysis.foreign import TABLE, from_tables
from analysis.runs import Runs, from_folders

_COMPRESSION: dict[str, Literal["gzip", "bz2", "xz", "zstd", "zip"]] = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zip": "zip",
}


@dataclass(frozen=True)
class Source:
    """A table and the file that it was read from.

    Args:
        file: a CSV or parquet file, or a folder sweeps/NAME or imported/NAME.
        sha256: of the bytes that were read; of a folder, those of its list of cells.
        runs: those of the folder, None of a file.
    """

    file: Path
    sha256: str
    table: pd.DataFrame
    runs: Runs | None = None

    def where(self, expression: str | None) -> "Source":
        """Return the rows for which `expression` is true, all if it is None; print how many.

        Raises:
            ValueError: the expression is none, or no row is left.
        """
        if expression is None:
            return self
        chosen = self.table[true_rows(self.table, expression, "--where")].copy()
        count = f"--where {expression!r} leaves {len(chosen)} of {len(self.table)} rows"
        if chosen.empty:
            raise ValueError(count)
        print(count)
        return replace(self, table=chosen)

    def with_numbers(self, *columns: str) -> "Source":
        """Return the table with `columns` as numbers; those that are expressions are computed.

        Raises:
            KeyError, ValueError: as in `expressions.numbers`.
        """
        computed = {column: numbers(self.table, column) for column in columns}
        return replace(self, table=self.table.assign(**computed))


def read_source(file: Path) -> Source:
    """Return the table in `file`; of a sweep's folder print how many runs have finished.

    Raises:
        ValueError: the file is no table, or has no rows.
    """
    runs = None
    if (file / TABLE).exists():
        content = (file / TABLE).read_bytes()
        runs = from_tables(file)
        table = runs.finished.copy()
    elif file.is_dir():
        listing = file / "cells.jsonl"
        content = listing.read_bytes() if listing.exists() else b""
        runs = from_folders(file.parent.parent, file.name)
        print(runs.count())
        table = runs.finished.copy()
    else:
        content = file.read_bytes()
        try:
            table = _parse(file, content)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} is no table: {reason}") from error
    if table.empty:
        raise ValueError(f"{file} has no {'finished runs' if file.is_dir() else 'rows'}")
    return Source(file, hashlib.sha256(content).hexdigest(), table, runs)


def _parse(file: Path, content: bytes) -> pd.DataFrame:
    """Return the table in the bytes that are hashed: the file may change while it is read."""
    if file.suffix == ".parquet":
        return pd.read_parquet(io.BytesIO(content))
    kind = _COMPRESSION.get(file.suffix)
    table = pd.read_csv(io.BytesIO(content), compression=kind)
    head = pd.read_csv(io.BytesIO(content), compression=kind, header=None, nrows=1, dtype=str)
    twice = head.iloc[0][head.iloc[0].duplicated()].dropna()
    if len(twice):  # pandas would rename the second
        raise ValueError(f"it has two columns {twice.iloc[0]!r}; rename or remove one")
    return table
