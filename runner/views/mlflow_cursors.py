"""What each MLflow store has of each run, and the store that a sweep is tracked in.

runs/<fingerprint>/mlflow/<sweep>-<store>.json   experiment, run_id, points delivered
runs/<fingerprint>/mlflow/<sweep>-<store>.lock   held by the one who makes or writes that run
sweeps/<name>/mlflow.json                        {"uri", "also"}: store and views of the last launch
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from runner.machine import storage
from runner.machine.errors import DataError
from runner.machine.typed_json import read_record
from runner.records import journal
from runner.records.cells import members, read_cell
from runner.records.metrics import FILE


def embedded_uri(root: Path) -> str:
    """Return the URI of the embedded store under `root`."""
    return f"sqlite:///{root.resolve() / 'mlflow' / 'mlflow.db'}"


def record_store(root: Path, sweep: str, uri: str | None, also: Sequence[str] = ()) -> None:
    """Record where the sweep is tracked: in the store at `uri` and in further views.

    Args:
        uri: None is the embedded store; "off" leaves the one recorded before.
    """
    file = root / "sweeps" / sweep / "mlflow.json"
    if uri == "off":
        uri = read_record(file, _Store)["uri"] if file.exists() else None
    tracked = {"uri": uri, "also": list(also)}
    storage.write_atomically(file, json.dumps(tracked))


def recorded_views(root: Path, sweep: str) -> list[str]:
    """Return the further views that the last launch of a sweep fed."""
    file = root / "sweeps" / sweep / "mlflow.json"
    return list(read_record(file, _Store).get("also", [])) if file.exists() else []


def recorded_store(root: Path, sweep: str) -> str | None:
    """Return the URI of the store that the sweep was tracked in last; None is the embedded one.

    Where a launch has recorded none, the frozen cells name it.

    Raises:
        ConfigError: there is no such sweep.
    """
    rows = members(root, sweep)
    file = root / "sweeps" / sweep / "mlflow.json"
    if file.exists():
        uri: str | None = read_record(file, _Store)["uri"]
        return uri
    for row in reversed(rows):
        with suppress(DataError):  # another cell may name it
            track = read_cell(root / "runs" / row["fingerprint"])["config"].get("track")
            named = track.get("uri") if isinstance(track, dict) else None
            if named not in (None, "off"):
                return str(named)
    return None


class _Store(TypedDict):
    uri: str | None
    also: NotRequired[list[str]]


class _Entries(TypedDict, total=False):
    experiment: str
    run_id: str
    sent: int
    past: list[list[int]]
    params: int


def read_entries(file: Path) -> dict[str, Any]:
    """Return the entries of a cursor's file.

    Raises:
        DataError: it is damaged.
    """
    return read_record(file, _Entries)


class Cursor:
    """The record of how much of a run the store at `uri` has, for one sweep.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path, sweep: str, uri: str) -> None:
        self.file = run / "mlflow" / f"{sweep}-{_digest(uri)}.json"
        self.lock = self.file.with_suffix(".lock")
        self.run = run

    def read(self) -> dict[str, Any]:
        """Return its entries, {} if the store has nothing yet."""
        return read_entries(self.file) if self.file.exists() else {}

    def write(self, entries: dict[str, Any]) -> None:
        """Replace its entries."""
        self.file.parent.mkdir(exist_ok=True)
        storage.write_atomically(self.file, json.dumps(entries))

    def now(self) -> dict[str, Any]:
        """Return the entries that differ when the run has changed since its delivery."""
        scored = max((f.stat().st_mtime_ns for f in self.run.glob("evals/*.json")), default=0)
        metrics = self.run / FILE
        size = metrics.stat().st_size if metrics.exists() else 0
        return {"state": journal.state(self.run), "size": size} | (
            {"scored": scored} if scored else {}
        )

    def is_behind(self) -> bool:
        """Return whether the run has begun and the store lacks something of it."""
        now = self.now()
        return now["state"] != "new" and not now.items() <= self.read().items()


def forget(root: Path, uri: str, sweeps: list[str] | None = None) -> list[str]:
    """Delete the cursors to the store at `uri`, of `sweeps` or all; return the sweeps that had any.

    Sweeps that are gone are left out.
    """
    tail = f"-{_digest(uri)}.json"
    had = set()
    for file in root.glob(f"runs/*/mlflow/*{tail}"):
        sweep = file.name.removesuffix(tail)
        if sweeps is None or sweep in sweeps:
            file.unlink()
            had.add(sweep)
    return sorted(s for s in had if (root / "sweeps" / s / "cells.jsonl").exists())


def _digest(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:8]
