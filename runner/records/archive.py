"""Cells moved between clusters: a tar file of a sweep's run folders and its list of members.

What belongs to one machine is left out: MLflow cursors, queue records, code snapshots.
"""

import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from runner.machine.errors import ConfigError, EspalierError
from runner.machine.typed_json import checked
from runner.records import journal
from runner.records.cells import Cell, add_members, member_row
from runner.records.names import run_folder, sweep_folder

_MEMBERS = "members.json"
_LEFT_OUT = {"mlflow", "views", "cancel"}


class _Row(TypedDict):
    fingerprint: str
    label: str


class _Listing(TypedDict):
    name: str
    cells: list[_Row]


def pack(cells: Sequence[Cell], name: str, file: Path) -> int:
    """Write the `cells` of sweep `name` to the tar `file`; return its size in bytes.

    Raises:
        ConfigError: a cell is running, or the file exists.
    """
    running = [cell.label for cell in cells if cell.state == "running"]
    if running:
        raise ConfigError(
            f"{len(running)} cells are running ({running[0]}); `espalier cancel {name}` or wait"
        )
    if file.exists():
        raise ConfigError(f"{file} exists; name another file with --out")
    rows = [member_row(cell) for cell in cells]
    with tarfile.open(file, "w") as tar, tempfile.TemporaryDirectory() as scratch:
        listing = Path(scratch) / _MEMBERS
        listing.write_text(json.dumps({"schema": 1, "name": name, "cells": rows}))
        tar.add(listing, _MEMBERS)
        for cell in cells:
            tar.add(cell.folder, f"runs/{cell.fingerprint}", filter=_portable)
    return file.stat().st_size


def unpack(file: Path, root: Path) -> tuple[str, int, int]:
    """Add the cells of `file` to `root`; return (sweep, cells added, cells left alone).

    A run that has begun under `root` is left alone.

    Raises:
        ConfigError: `file` was not made by `pack`.
    """
    added = 0
    with _opened(file) as (tar, record):
        for row in record["cells"]:
            folder = run_folder(root, row["fingerprint"])
            if journal.attempts(folder):
                continue
            prefix = f"runs/{row['fingerprint']}/"
            tar.extractall(
                root, [m for m in tar.getmembers() if m.name.startswith(prefix)], filter="data"
            )
            added += 1
    add_members(sweep_folder(root, record["name"]), record["cells"])
    return record["name"], added, len(record["cells"]) - added


@contextmanager
def _opened(file: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """Yield (the archive, its listing: name, cells)."""
    try:
        with tarfile.open(file) as tar:
            stream = tar.extractfile(_MEMBERS)
            assert stream is not None
            yield tar, checked(json.loads(stream.read()), _Listing, f"{file}: {_MEMBERS}")
    except (tarfile.TarError, KeyError, ValueError, AssertionError, EOFError) as error:
        if isinstance(error, EspalierError):
            raise
        raise ConfigError(f"{file} is no archive of `espalier pack`, or damaged") from error


def _portable(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    parts = entry.name.split("/")
    return None if len(parts) > 2 and parts[2] in _LEFT_OUT else entry
