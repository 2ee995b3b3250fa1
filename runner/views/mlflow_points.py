"""The metrics of a run as points, for a store that takes each (key, step) once and deletes nothing.

Points that are valid when they are delivered are sent. Where a later attempt takes one back or
writes another value, the store keeps its own, and the run is tagged with the number of such points.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from runner.machine.typed_json import read_record
from runner.records.metrics import NOT_METRICS, MetricsReader

_BATCH = 1000  # points that MLflow takes in a call
Point = tuple[str, int, int, float]  # key, step, time in ms, value
PointKey = tuple[str, int]  # key, step


class _Score(TypedDict):
    name: str
    value: float


class _Scores(TypedDict):
    step: int
    scores: list[_Score]
    values: NotRequired[dict[str, float]]


class PointReader:
    """Reads the points of a run as they are written and tracks which of them a store has.

    `points` are those of all rows, in file order. They stay in the list when a later row at the
    same step replaces them or a `restored` takes them back; the store gets one per (key, step).
    """

    def __init__(self, run: Path) -> None:
        self.run, self._lines = run, MetricsReader(run)
        self.points: list[Point] = []
        self._valid: dict[PointKey, int] = {}  # index of the valid point
        self._stored = bytearray()  # for each point delivered, whether the store has it
        self._outdated: dict[PointKey, int] = {}  # index of the store's point where it is not valid

    def read(self) -> None:
        """Read the complete lines that were added since the last call."""
        for line in self._lines.read():
            if "restored" in line:
                for key in [k for k in self._valid if k[1] > line["restored"]]:
                    self._drop(key)
                continue
            step, time_ms = line["step"], int(line.get("time", 0) * 1000)
            for metric in (name for name in line if name not in NOT_METRICS):
                self._drop((metric, step))
                self._valid[metric, step] = len(self.points)
                self.points.append((metric, step, time_ms, float(line[metric])))

    def _drop(self, key: PointKey) -> None:
        index = self._valid.pop(key, None)
        if index is not None and index < len(self._stored) and self._stored[index]:
            self._outdated[key] = index

    def next_batch(self) -> tuple[list[Point], list[int], int]:
        """Return (the next points to send, indices of those no longer valid, index after them)."""
        begin = len(self._stored)
        send, past = [], []
        for index, point in enumerate(self.points[begin : begin + _BATCH], begin):
            if self._valid.get(point[:2]) != index:
                past.append(index)
            elif point[:2] not in self._outdated:
                send.append(point)
        return send, past, min(begin + _BATCH, len(self.points))

    def mark_delivered(self, delivered: int, past: Iterable[int]) -> None:
        """Record that a store has the first `delivered` points except those at indices `past`."""
        without = set(past)
        for index in range(len(self._stored), min(delivered, len(self.points))):
            key = self.points[index][:2]
            stored = index not in without and key not in self._outdated
            self._stored.append(stored)
            if stored and self._valid.get(key) != index:
                self._outdated[key] = index

    def superseded(self) -> int:
        """Return how many points of the store are no longer valid.

        Times and system metrics, which differ between any two attempts, are left out.
        """
        return sum(self._differs(key, index) for key, index in self._outdated.items())

    def _differs(self, key: PointKey, stored: int) -> bool:
        if key[0].startswith("system/") or key[0].endswith(("_s", "mfu", "fraction")):
            return False
        if key not in self._valid:
            return True
        pair = self.points[stored][3], self.points[self._valid[key]][3]
        return pair[0] != pair[1] and not all(map(math.isnan, pair))

    def scores(self) -> Iterator[tuple[str, float, int, int]]:
        """Yield (key, value, time in ms, step) of evaluation results that metrics.jsonl lacks."""
        for file in sorted(self.run.glob("evals/*.json")):
            results, time_ms = read_record(file, _Scores), file.stat().st_mtime_ns // 1_000_000
            scores = {row["name"]: row["value"] for row in results["scores"]}
            for name, value in (scores | results.get("values", {})).items():
                key = name, results["step"]
                if key not in self._valid and key not in self._outdated:
                    yield name, value, time_ms, results["step"]


def ranges(ascending: Iterable[int]) -> list[list[int]]:
    """Return the ranges [first, last + 1] of consecutive indices, which keeps a cursor short."""
    merged: list[list[int]] = []
    for index in ascending:
        if merged and merged[-1][1] == index:
            merged[-1][1] += 1
        else:
            merged.append([index, index + 1])
    return merged


def indices(ranges: Iterable[list[int]]) -> Iterator[int]:
    """Yield the indices in `ranges`, the inverse of the function `ranges`."""
    return (index for begin, end in ranges for index in range(begin, end))
