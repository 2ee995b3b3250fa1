"""Parts of run folders, written by hand: lines of metrics, attempts and who has them."""

import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil


def row(attempt: int, step: int, loss: float, **more: float) -> str:
    """Return a line of metrics."""
    stands = {"step": step, "time": 100.0 * attempt + step, "attempt": attempt}
    return json.dumps(stands | {"loss": loss} | more) + "\n"


def restored(attempt: int, step: int) -> str:
    """Return the line with which an attempt goes on from a checkpoint."""
    return json.dumps({"restored": step, "time": 100.0 * attempt, "attempt": attempt}) + "\n"


@dataclass(frozen=True)
class Holder:
    """Who has or had an attempt, and what it recorded."""

    events: tuple[str, ...] = ()
    host: str = socket.gethostname()
    process: Literal["ended", "this", "later"] = "ended"  # later: another has its pid now
    beat_s: float | None = None  # age of its heartbeat

    def write(self, attempt: Path) -> None:
        """Write the attempt's folder."""
        attempt.mkdir(parents=True)
        pid, begun = os.getpid(), psutil.Process().create_time()
        if self.process == "ended":
            child = subprocess.Popen(["true"])
            pid = child.pid
            child.wait()
        elif self.process == "later":
            begun -= 3600
        lease = {"host": self.host, "pid": pid, "process_start": begun}
        (attempt / "lease.json").write_text(json.dumps(lease))
        if self.beat_s is not None:
            (attempt / "heartbeat").touch()
            then = time.time() - self.beat_s
            os.utime(attempt / "heartbeat", (then, then))
        lines = [json.dumps({"event": event, "time": 1.0}) + "\n" for event in self.events]
        (attempt / "events.jsonl").write_text("".join(lines))


ENDED = Holder(("started", "interrupted"))
DONE = Holder(("started", "finished"))
