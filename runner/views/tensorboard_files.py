"""TensorBoard's event files: `tensorboard --logdir tensorboard`.

tensorboard/<sweep>/<label> <fingerprint>/events.out.tfevents...    one file for each session
"""

import os
import re
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.metadata import (
    SESSION_START_INFO_TAG,
    create_summary_metadata,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from runner.views.mlflow_points import Point
from runner.views.other_views import ShownRun

_NOT_IN_PATHS = re.compile(r"[^\w\-.=+, ]")
_NAME = 120  # characters of a folder's name


class EventFile:
    """The file of one session; `saved` has the lengths of all files of the run."""

    def __init__(self, folder: Path, lengths: dict[str, int]) -> None:
        self._lengths = lengths
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = folder / name
        self._stream = open(self._file, "wb")  # noqa: SIM115  (closed by `end`)
        self._writer = RecordWriter(self._stream)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def describe(self, params: dict[str, Any]) -> None:
        """Add the parameters, by which the tab HParams compares runs."""
        info = SessionStartInfo(start_time_secs=time.time())
        for key, value in params.items():
            field = {bool: "bool_value", int: "number_value", float: "number_value"}
            setattr(info.hparams[key], field.get(type(value), "string_value"), value)
        data = create_summary_metadata(HParamsPluginData(session_start_info=info))
        entry = Summary.Value(tag=SESSION_START_INFO_TAG, metadata=data)
        self._write(Event(wall_time=time.time(), summary=Summary(value=[entry])))

    def write(self, points: list[Point]) -> None:
        """See `Session`."""
        for key, step, time_ms, value in points:
            entry = Summary.Value(tag=key, simple_value=value)
            at = time_ms / 1000 or time.time()
            self._write(Event(wall_time=at, step=step, summary=Summary(value=[entry])))

    def saved(self) -> dict[str, int]:
        """See `Session`."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._lengths | {self._file.name: self._stream.tell()}

    def end(self, _state: str) -> dict[str, int]:
        """See `Session`."""
        lengths = self.saved()
        self._stream.close()
        return lengths


def open_session(run: ShownRun, saved: dict[str, int] | None) -> EventFile:
    """Return a new file of a run; of earlier ones what is not in `saved` is cut off."""
    label = _NOT_IN_PATHS.sub("_", run.label)[:_NAME].strip()
    folder = run.root / "tensorboard" / run.sweep / f"{label} {run.fingerprint[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    lengths = saved or {}
    for file in folder.glob("events.out.tfevents.*"):
        if file.name not in lengths:
            file.unlink()
        elif file.stat().st_size > lengths[file.name]:
            os.truncate(file, lengths[file.name])
    events = EventFile(folder, lengths)
    if not lengths:
        events.describe(dict(run.params))
    return events
