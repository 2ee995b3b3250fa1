"""A cell or a sweep described in a few lines, for `espalier show` and `espalier ls`."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from typing_extensions import TypedDict

from runner.machine.errors import DataError
from runner.machine.typed_json import read_record
from runner.records import journal, metrics
from runner.records.cells import members


class _Adopted(TypedDict):
    reason: str


def describe(folder: Path) -> Iterator[str]:
    """Yield lines about the run in `folder`: state, sizes, attempts with their events, metrics."""
    yield f"{folder.name} {journal.state(folder)}: {folder}"
    adopted = folder / "adopted.json"
    if adopted.exists():
        note = read_record(adopted, _Adopted)
        yield f"adopted from {note.get('from')}: {note['reason']}"
    summary = folder / "summary.json"
    if summary.exists():
        yield " ".join(f"{key}={value}" for key, value in read_record(summary).items())
    for attempt in journal.attempts(folder):
        lease = journal.lease(attempt)
        holder = f"{lease['host']} pid {lease['pid']}"
        holder += f" job {lease['job']}" if "job" in lease else ""
        yield f"attempt {int(attempt.name)} on {holder}"
        for event in journal.events(attempt):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
            details = {k: v for k, v in event.items() if k not in ("event", "time", "traceback")}
            yield f"  {when} {event['event']} " + " ".join(f"{k}={v}" for k, v in details.items())
    last = metrics.last_values(metrics.read(folder))
    yield " ".join(f"{k}={v:.6g}" for k, v in last.items() if k not in ("time", "attempt"))


def summary(root: Path, name: str) -> str:
    """Return a line: a sweep's number of cells by state and the time of its last metrics."""
    folders = [root / "runs" / row["fingerprint"] for row in members(root, name)]
    states = Counter(map(_state, folders))
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    files = [f / metrics.FILE for f in folders if (f / metrics.FILE).exists()]
    last = max((f.stat().st_mtime for f in files), default=None)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last)) if last else "never run"
    return f"{len(folders)} cells ({counts}), {when}"


def _state(folder: Path) -> str:
    try:
        return journal.state(folder)
    except DataError:  # `espalier status` says why
        return "unreadable"
