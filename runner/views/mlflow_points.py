"""The metrics of a run as points for a store that takes each (key, step) once and forgets nothing.

What counts when it is delivered is sent. Where a later attempt then takes it back or writes another value,
the store keeps what it has, and the run says how many such points there are.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from runner.records.metrics import NOT_METRICS, MetricsReader

_BATCH = 1000  # what MLflow takes in a call
Point = tuple[str, int, int, float]  # key, step, time in ms, value
Place = tuple[str, int]  # key, step


class PointReader:
    """The points of a run as they are written, and which of them a store has.

    `points` are those of all rows, in file order. They stay in the list where a later row at the same
    step replaces them or a `restored` takes them back; the store gets one for each (key, step).
    """

    def __init__(self, run: Path) -> None:
        self.run, self._lines = run, MetricsReader(run)
        self.points: list[Point] = []
        self._counting: dict[Place, int] = {}  # which of the points counts
        self._stored = bytearray()  # for each of the points delivered, whether the store has it
        self._outdated: dict[Place, int] = {}  # what the store has, where that does not count

    def read(self) -> None:
        """Take in the whole lines that were added since the last call."""
        for line in self._lines.read():
            if "restored" in line:
                for place in [p for p in self._counting if p[1] > line["restored"]]:
                    self._drop(place)
                continue
            step, time_ms = line["step"], int(line["time"] * 1000)
            for key in (key for key in line if key not in NOT_METRICS):
                self._drop((key, step))
                self._counting[key, step] = len(self.points)
                self.points.append((key, step, time_ms, float(line[key])))

    def _drop(self, place: Place) -> None:
        index = self._counting.pop(place, None)
        if index is not None and index < len(self._stored) and self._stored[index]:
            self._outdated[place] = index

    def next_batch(self) -> tuple[list[Point], list[int], int]:
        """Return what to send of the next points, the indices of those that count no more, and their end."""
        begin = len(self._stored)
        send, past = [], []
        for index, point in enumerate(self.points[begin : begin + _BATCH], begin):
            if self._counting.get(point[:2]) != index:
                past.append(index)
            elif point[:2] not in self._outdated:
                send.append(point)
        return send, past, min(begin + _BATCH, len(self.points))

    def note(self, delivered: int, past: Iterable[int]) -> None:
        """Note that a store has the first `delivered` points but for those in `past`."""
        without = set(past)
        for index in range(len(self._stored), min(delivered, len(self.points))):
            place = self.points[index][:2]
            stored = index not in without and place not in self._outdated
            self._stored.append(stored)
            if stored and self._counting.get(place) != index:
                self._outdated[place] = index

    def superseded(self) -> int:
        """Return how many points of the store count no more; what no two attempts share is left out."""
        return sum(self._differs(place, index) for place, index in self._outdated.items())

    def _differs(self, place: Place, stored: int) -> bool:
        if place[0].startswith("system/") or place[0].endswith(("_s", "mfu", "fraction")):
            return False
        if place not in self._counting:
            return True
        pair = self.points[stored][3], self.points[self._counting[place]][3]
        return pair[0] != pair[1] and not all(map(math.isnan, pair))

    def scores(self) -> Iterator[tuple[str, float, int, int]]:
        """Yield (key, value, time, step) of what evaluations have found that the run did not log itself."""
        for file in sorted(self.run.glob("evals/*.json")):
            found, time_ms = json.loads(file.read_text()), file.stat().st_mtime_ns // 1_000_000
            scores = {row["name"]: row["value"] for row in found["scores"]}
            for name, value in (scores | found.get("values", {})).items():
                place = name, found["step"]
                if place not in self._counting and place not in self._outdated:
                    yield name, value, time_ms, found["step"]


def ranges(ascending: Iterable[int]) -> list[list[int]]:
    """Return indices as [first, last + 1] of each row of them: what is taken back lies together."""
    found: list[list[int]] = []
    for index in ascending:
        if found and found[-1][1] == index:
            found[-1][1] += 1
        else:
            found.append([index, index + 1])
    return found


def indices(found: Iterable[list[int]]) -> Iterator[int]:
    """Yield what `ranges` was made of."""
    return (index for begin, end in found for index in range(begin, end))
