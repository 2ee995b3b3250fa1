"""The backend of a sweep's last launch, from launcher.json."""

import json
from pathlib import Path
from typing import Any

from runner.launch.backend import Backend
from runner.launch.local import Local
from runner.launch.slurm import Slurm, SlurmConfig
from runner.records.config import typed


def last_backend(sweep: Path, jobs: int | None) -> Backend:
    """Return the backend of a sweep's last launch, or this machine with `jobs` cells at a time."""
    file = sweep / "launcher.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"launcher": ""}
    if jobs is None and record["launcher"] == "slurm":
        return Slurm(typed("hydra.launcher", SlurmConfig, record["keys"]))
    return Local(jobs or record.get("jobs"))
