"""Start and stop the process that uploads metrics, as the import of MLflow takes seconds."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runner.machine.own_modules import module_command
from runner.records.config import RunConfig
from runner.views.mlflow import NOTICE
from runner.views.mlflow_cursors import record_store

# Set in the environment while an uploader runs: workers then start none.
UPLOADER_RUNS = "ESPALIER_FED"
_LAST_UPLOAD_S = 120


@dataclass(frozen=True)
class UploaderProcess:
    """A running uploader; its log, to which others may append too, is its own from `begin` on."""

    process: subprocess.Popen[bytes]
    sweep: str
    log: Path
    begin: int

    def finish(self, timeout_s: float = _LAST_UPLOAD_S) -> list[str]:
        """Make it upload the rest and end; return lines for the user: notices, what is missing."""
        assert self.process.stdin is not None
        os.environ.pop(UPLOADER_RUNS, None)  # later workers of this process start their own
        self.process.stdin.close()  # the signal to end
        why = f"{self.log} tells why"
        try:
            complete = self.process.wait(timeout=timeout_s) == 0
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            self.process.kill()
            complete = False
            late = isinstance(error, subprocess.TimeoutExpired)
            why = f"it had {timeout_s:.0f} s" if late else "it was stopped"
        with open(self.log, encoding="utf-8", errors="replace") as stream:
            stream.seek(self.begin)
            lines = stream.read().splitlines()
        notices = list(dict.fromkeys(line for line in lines if line.startswith(NOTICE)))
        if complete:
            return notices
        return [
            *notices,
            f"not everything was uploaded; `espalier sync {self.sweep}` delivers it; {why}",
        ]


def start_uploader(run: RunConfig, only: str | None = None) -> UploaderProcess | None:
    """Start the uploader of a run's sweep and return its process; None if nothing is tracked.

    Args:
        only: upload the cell of this fingerprint alone.
    """
    if run.track.uri == "off" and not run.track.also:
        return None
    os.environ[UPLOADER_RUNS] = "1"
    root = Path(run.root).resolve()
    record_store(root, run.name, run.track.uri, run.track.also)
    command = module_command("runner.views.upload", run.name)
    command += ["--root", str(root), "--until-closed"]
    if run.track.uri:
        command += ["--uri", run.track.uri]
    for view in run.track.also:
        command += ["--also", view]
    if only:
        command += ["--only", only]
    file = root / "sweeps" / run.name / "sync.log"
    with open(file, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
        return UploaderProcess(process, run.name, file, log.tell())


def finish_uploader(
    uploader: UploaderProcess | None, timeout_s: float = _LAST_UPLOAD_S
) -> list[str]:
    """Return what `UploaderProcess.finish` does, nothing without an uploader."""
    return [] if uploader is None else uploader.finish(timeout_s)
