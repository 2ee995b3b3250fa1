"""The uploader beside a launcher or a job: a process of its own, since importing MLflow takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

from runner.records.config import RunConfig

# Set where somebody already feeds MLflow: a worker then does not.
FED = "ESPALIER_FED"
_LAST_DELIVERY_S = 120


def start_uploader(run: RunConfig, only: str | None = None) -> subprocess.Popen[bytes] | None:
    """Feed the sweep of `run`, or `only` one of its fingerprints; None where tracking is off."""
    if run.track.uri == "off":
        return None
    os.environ[FED] = "1"
    root = Path(run.root).resolve()
    command = [
        sys.executable,
        "-m",
        "runner.views.mlflow",
        run.name,
        "--root",
        str(root),
        "--until-closed",
    ]
    if run.track.uri:
        command += ["--uri", run.track.uri]
    if only:
        command += ["--only", only]
    with open(root / "sweeps" / run.name / "sync.log", "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )


def finish_uploader(
    uploader: subprocess.Popen[bytes] | None, timeout_s: float = _LAST_DELIVERY_S
) -> bool:
    """Close its input, which tells it to deliver the rest and end; True where it could in time."""
    if uploader is None or uploader.stdin is None:
        return True
    os.environ.pop(FED, None)  # what this process starts from now on feeds itself again
    uploader.stdin.close()
    try:
        return uploader.wait(timeout=timeout_s) == 0
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        uploader.kill()
        return False
