"""The one reader of metrics.jsonl: which of its lines are valid (docs/run-folder.md, rule 1).

A cell's attempts write to one file, and a worker that was taken for dead may write on beside its
successor. So a line is void where an earlier line is of a later attempt, and {"restored": k} takes
back all rows before it with a step above k. The remaining rows, in file order, are the run's.
"""

import itertools
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import TypedDict

from runner.machine import environment, storage
from runner.machine.typed_json import read_record
from runner.records import journal

FILE = "metrics.jsonl"
NOT_METRICS = ("step", "time", "attempt")  # keys of a row that are no metrics
_TAIL_BYTES, _FURTHER = 1 << 14, 8  # about sixty rows; the factor of each further look back
Line = dict[str, Any]


def _stands_somewhere(line: Line) -> Line:
    if not isinstance(line.get("restored", line.get("step")), int):
        raise ValueError("has no whole number as `step` or `restored`")
    return line


@cache
def _shape() -> Any:
    from pydantic import AfterValidator  # noqa: PLC0415  (0.1 s, which help and Tab do without)

    return Annotated[dict[str, int | float | bool], AfterValidator(_stands_somewhere)]


class _Summary(TypedDict):
    steps: int


class MetricsReader:
    """Reads the metrics of a run while the file grows, each line once.

    Args:
        run: the run folder; the file need not exist yet.
        offset: the byte to begin at, the start of a line.
    """

    def __init__(self, run: Path, offset: int = 0) -> None:
        self._file, self._offset = run / FILE, offset
        self._newest = 0  # the latest attempt read so far

    def read(self) -> list[Line]:
        """Return the complete, non-void lines added since the last call.

        A line is a row or {"restored": k}, which takes back rows of this call and of earlier ones.

        Raises:
            DataError: a line is damaged; the message names file and line.
        """
        lines, self._offset = storage.read_lines_after(self._file, self._offset, _shape())
        valid = []
        for line in lines:
            attempt = line.get("attempt", self._newest)
            if attempt >= self._newest:
                self._newest = attempt
                valid.append(line)
        return valid


def valid_rows(lines: Iterable[Line]) -> list[Line]:
    """Return those rows of a `MetricsReader`'s `lines` that no later `restored` takes back."""
    rows: list[Line] = []
    for line in lines:
        if "restored" in line:
            rows = [row for row in rows if row["step"] <= line["restored"]]
        else:
            rows.append(line)
    return rows


def last_values(rows: Iterable[Line]) -> Line:
    """Return the last value of each key."""
    return {key: value for row in rows for key, value in row.items()}


def read(run: Path) -> list[Line]:
    """Return the valid rows of a run in file order, [] if nothing is logged yet.

    Of two rows that have the same metric at the same step the later one counts.

    Raises:
        DataError: a line is damaged; the message names file and line.
    """
    return valid_rows(MetricsReader(run).read())


def measure_of(run: Path) -> str | None:
    """Return the name of the measure that chooses the best checkpoint of `run`, as it noted.

    None before it has begun.
    """
    record = environment.first_record(run)
    return str(record.get("measure", ("val_loss", "min"))[0]) if record else None


def latest(run: Path, *keys: str) -> Line:
    """Return the latest values of `keys`, see `LatestValues`; read the file once.

    Raises:
        DataError: a line is damaged; the message names file and line.
    """
    return LatestValues(run, *keys).read()


class LatestValues:
    """The latest value of each of `keys` in the valid rows of a run, of every key if none is named.

    The first read goes backwards from the file's end until it has all `keys`; later ones go on from
    there.
    """

    def __init__(self, run: Path, *keys: str) -> None:
        self._run, self._keys = run, keys
        self._reader: MetricsReader | None = None
        self._values: Line = {}

    def read(self) -> Line:
        """Return the values logged so far and the planned `steps` of summary.json.

        Raises:
            DataError: a line is damaged; the message names file and line.
        """
        added = [] if self._reader is None else self._reader.read()
        if self._reader is None or any("restored" in line for line in added):
            self._reader, self._values = self._look_back()
        else:
            self._values |= last_values(added)
        summary = self._run / "summary.json"
        planned = {"steps": read_record(summary, _Summary)["steps"]} if summary.exists() else {}
        named = self._keys or self._values
        return planned | {key: self._values[key] for key in named if key in self._values}

    def _look_back(self) -> tuple[MetricsReader, Line]:
        """Return (a reader at the end of the file, the latest values).

        From the first line of the newest attempt that has a lease, a line's validity is known
        without the lines before: no later attempt can have written.
        """
        file, span = self._run / FILE, _TAIL_BYTES
        tries = journal.attempts(self._run)
        newest = int(tries[-1].name) if tries else math.inf
        while True:
            offset = _line_after(file, span)
            reader = MetricsReader(self._run, offset)
            lines = reader.read()
            earlier = itertools.takewhile(lambda line: line.get("attempt", 0) < newest, lines)
            begin = len(list(earlier)) if offset else 0
            values = last_values(valid_rows(lines[begin:]))
            if not offset or (self._keys and values.keys() >= set(self._keys)):
                return reader, values
            span *= _FURTHER


def _line_after(file: Path, span: int) -> int:
    """Return the offset of the first line that begins in the last `span` bytes, 0 if all do."""
    size = file.stat().st_size if file.exists() else 0
    if size <= span:
        return 0
    with open(file, "rb") as stream:
        stream.seek(size - span)
        stream.readline()
        return stream.tell()
