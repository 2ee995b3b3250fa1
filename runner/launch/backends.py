"""The backend of a sweep's last launch, in launcher.json."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from runner.launch.backend import Backend
from runner.machine import storage
from runner.machine.errors import EspalierError
from runner.machine.typed_json import read_record
from runner.records.config import typed


class _Record(TypedDict):
    launcher: str
    keys: NotRequired[dict[str, Any]]
    jobs: NotRequired[int | None]


def last_backend(sweep: Path, jobs: int | None) -> Backend:
    """Return the backend of a sweep's last launch, or this machine with `jobs` cells at a time."""
    file = sweep / "launcher.json"
    record: dict[str, Any] = {"launcher": ""}
    if file.exists():
        record = read_record(file, _Record)
    if jobs is None and record["launcher"] == "slurm":
        from runner.launch.slurm import Slurm, SlurmConfig  # noqa: PLC0415

        return Slurm(typed("hydra.launcher", SlurmConfig, record.get("keys", {})))
    from runner.launch.local import Local  # noqa: PLC0415

    return Local(jobs or record.get("jobs"))


@contextmanager
def recorded(sweep: Path, backend: Backend) -> Iterator[None]:
    """Record `backend` as that of the sweep's last launch; not one that refused all cells."""
    file = sweep / "launcher.json"
    earlier = file.read_text() if file.exists() else None
    storage.write_atomically(file, json.dumps(backend.record()))
    try:
        yield
    except EspalierError:
        jobs = (sweep / "submissions").glob("*.json")
        if earlier is not None:
            storage.write_atomically(file, earlier)
        elif not any(jobs):
            file.unlink(missing_ok=True)
        raise
