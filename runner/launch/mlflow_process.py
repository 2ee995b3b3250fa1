"""Start and stop the process that uploads metrics to MLflow, whose import takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

from runner.records.config import RunConfig

# Set in the environment while an uploader runs: workers then start none.
UPLOADER_RUNS = "ESPALIER_FED"
_LAST_UPLOAD_S = 120


def start_uploader(run: RunConfig, only: str | None = None) -> subprocess.Popen[bytes] | None:
    """Start the uploader of a run's sweep and return its process; None if tracking is off.

    Args:
        only: upload the cell of this fingerprint alone.
    """
    if run.track.uri == "off":
        return None
    os.environ[UPLOADER_RUNS] = "1"
    root = Path(run.root).resolve()
    command = [sys.executable, "-m", "runner.views.mlflow", run.name]
    command += ["--root", str(root), "--until-closed"]
    if run.track.uri:
        command += ["--uri", run.track.uri]
    if only:
        command += ["--only", only]
    with open(root / "sweeps" / run.name / "sync.log", "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )


def finish_uploader(
    uploader: subprocess.Popen[bytes] | None, timeout_s: float = _LAST_UPLOAD_S
) -> bool:
    """Make the uploader upload the rest and end; return whether it did so within `timeout_s`."""
    if uploader is None or uploader.stdin is None:
        return True
    os.environ.pop(UPLOADER_RUNS, None)  # later workers of this process start their own
    uploader.stdin.close()  # the signal to end
    try:
        return uploader.wait(timeout=timeout_s) == 0
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        uploader.kill()
        return False
