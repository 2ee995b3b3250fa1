"""Further views of runs beside MLflow: TensorBoard, W&B (`track.also`), fed from metrics.jsonl.

    runs/<fingerprint>/views/<sweep>-<view>.json   what the view has; session: files that hold it

A view takes each (key, step) once. What a process wrote beyond its cursor when it was killed is
taken back by the next one (`open_session`), which sends it again: nothing is missing or doubled.
One process at a time feeds a run, as long as the run goes on.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from runner.machine import storage
from runner.records.cells import members
from runner.views.mlflow_cursors import Cursor
from runner.views.mlflow_points import Point, PointReader, indices, ranges
from runner.views.mlflow_runs import params_of, run_name

Name = Literal["tensorboard", "wandb"]
_MODULES = {"tensorboard": "runner.views.tensorboard_files", "wandb": "runner.views.wandb_runs"}


@dataclass(frozen=True)
class ShownRun:
    """What a view shows of a run beside its points."""

    root: Path
    sweep: str
    fingerprint: str
    label: str
    params: Mapping[str, bool | int | float | str]


class Session(Protocol):
    """One run in a view, written by one process."""

    def write(self, points: list[Point]) -> None:
        """Add points."""

    def saved(self) -> Any | None:
        """Return JSON that tells what holds all that was written; None where only `end` saves."""

    def end(self, state: str) -> Any:
        """Finish what was written; return what `saved` does."""


class ViewCursor(Cursor):
    """The record of how much of a run a view has."""

    def __init__(self, run: Path, sweep: str, view: str) -> None:
        super().__init__(run, sweep, view)
        self.file = run / "views" / f"{sweep}-{view}.json"
        self.lock = self.file.with_suffix(".lock")


class _Feed:
    """A run that this process feeds: it holds the cursor's lock until `close`."""

    def __init__(self, cursor: ViewCursor, session: Session, lock: ExitStack) -> None:
        self.cursor, self.session, self._lock = cursor, session, lock
        self.entries = cursor.read()
        self.reader = PointReader(cursor.run)

    def send(self) -> int:
        """Send what the view lacks; return the number of points."""
        now = self.cursor.now()
        self.reader.read()
        sent = 0
        for points in self._batches():
            self.session.write(points)
            sent += len(points)
        scored = [p for p in self.reader.scores() if [p[0], p[3]] not in self._scored()]
        if scored:
            points = [(key, step, time_ms, value) for key, value, time_ms, step in scored]
            self.session.write(points)
            self.entries["scores"] = [*self._scored(), *([p[0], p[1]] for p in points)]
        self._save(self.session.saved(), now)
        return sent + len(scored)

    def close(self) -> None:
        """Finish the session and let another process feed the run."""
        now = self.cursor.now()
        self._save(self.session.end(now["state"]), self.entries.get("now", now))
        self._lock.close()

    def _scored(self) -> list[list[Any]]:
        return list(self.entries.get("scores", []))

    def _save(self, session: Any | None, now: dict[str, Any]) -> None:
        self.entries["now"] = now
        if session is not None:
            entries = {key: value for key, value in self.entries.items() if key != "now"}
            self.cursor.write(entries | {"session": session} | now)

    def _batches(self) -> Iterator[list[Point]]:
        entries = self.entries
        entries.setdefault("sent", 0)
        self.reader.mark_delivered(entries["sent"], indices(entries.get("past", [])))
        while entries["sent"] < len(self.reader.points):
            points, past, after = self.reader.next_batch()
            if points:
                yield points
            entries |= {"sent": after, "past": ranges([*indices(entries.get("past", [])), *past])}
            self.reader.mark_delivered(after, past)


class ViewFeeder:
    """Feeds the cells of sweeps to one view.

    Args:
        root: the folder of runs/ and sweeps/.
    """

    def __init__(self, root: Path, view: str) -> None:
        self.root, self.view = root.resolve(), view
        self._open_session = importlib.import_module(_MODULES[view]).open_session
        self._feeds: dict[str, _Feed] = {}

    def deliver(self, sweep: str, only: str | None = None) -> int:
        """Bring the view up to date with a sweep; return the number of points sent."""
        sent = 0
        for row in members(self.root, sweep):
            if only not in (None, row["fingerprint"]):
                continue
            cursor = ViewCursor(self.root / "runs" / row["fingerprint"], sweep, self.view)
            feed = self._feeds.get(cursor.run.name) or self._begin(cursor, sweep, row)
            if feed is not None:
                sent += feed.send()
                if cursor.now()["state"] != "running":
                    self._feeds.pop(cursor.run.name).close()
        return sent

    def close(self) -> None:
        """Finish all runs, those that go on as well: another process continues them."""
        while self._feeds:
            self._feeds.popitem()[1].close()

    def _begin(self, cursor: ViewCursor, sweep: str, row: dict[str, Any]) -> _Feed | None:
        if not cursor.is_behind():
            return None
        lock = ExitStack()
        if not lock.enter_context(storage.try_locked(cursor.lock)):
            return None  # another process feeds it
        label = run_name(row["label"] or cursor.run.name[:8], cursor.run.name)
        texts = dict(params_of(cursor.run, row.get("choices", {})))
        params = {key: _parsed(text) for key, text in texts.items()}
        shown = ShownRun(self.root, sweep, cursor.run.name, label, params)
        session = self._open_session(shown, cursor.read().get("session"))
        feed = self._feeds[cursor.run.name] = _Feed(cursor, session, lock)
        return feed


def _parsed(text: str) -> bool | int | float | str:
    """Return the number or truth value that a parameter's text is, else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def is_behind(sweep: Path, view: str) -> bool:
    """Return whether a view lacks something of a sweep, by the cursors."""
    root = sweep.parent.parent
    runs = [root / "runs" / row["fingerprint"] for row in members(root, sweep.name)]
    return any(ViewCursor(run, sweep.name, view).is_behind() for run in runs)
