"""Readers of metrics agree with the rules of docs/run-folder.md on any file (hypothesis)."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.history import assemble, read_folder
from runner.records import metrics
from runner.views.mlflow_points import PointReader
from tests.run_folders import ENDED

NAN, INF = math.nan, math.inf
Points = dict[tuple[str, int], float]  # (key, step): value

# Lines of up to three attempts in any order, each with one of two metrics or both.
VALUES = st.sampled_from([0.5, -1.0, 2.0, NAN, INF])
LINE = st.fixed_dictionaries({"attempt": st.integers(1, 3)}) | st.just({})
ROW = st.fixed_dictionaries(
    {"step": st.integers(0, 6), "time": st.just(1.5)}, optional={"a": VALUES, "b": VALUES}
)
BACK = st.fixed_dictionaries({"restored": st.integers(0, 6)})
FILES = st.lists(
    st.tuples(LINE, ROW | ROW | ROW | BACK).map(lambda pair: pair[1] | pair[0]), max_size=40
)


def oracle(lines: list[dict[str, Any]]) -> Points:
    """Return what counts, where it was written: rule 1 in ten lines."""
    points: Points = {}
    newest = 0
    for line in lines:
        if line.get("attempt", newest) >= newest:
            newest = line.get("attempt", newest)
            if "restored" in line:
                points = {p: v for p, v in points.items() if p[1] <= line["restored"]}
            for key in line.keys() & {"a", "b"}:
                points.pop((key, line["step"]), None)
                points[key, line["step"]] = line[key]
    return points


def series(points: Points) -> list[str]:
    """Return the points of each metric in their order; NaN is NaN."""
    return [repr([(s, v) for (k, s), v in points.items() if k == key]) for key in ("a", "b")]


def of_rows(rows: list[dict[str, Any]]) -> Points:
    """Return the points of rows that count."""
    return oracle([{k: v for k, v in row.items() if k != "attempt"} for row in rows])


def last_of(points: Points) -> str:
    """Return the last value of each metric."""
    last = {key: value for (key, _), value in points.items()}
    return repr([last.get(key) for key in ("a", "b")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder with three attempts; of its metrics, the runner's tail is a line or two."""
    made = tmp_path_factory.mktemp("run")
    for number in (1, 2, 3):
        ENDED.write(made / "attempts" / f"{number:04d}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_TAIL_BYTES", 100)
        patch.setattr(metrics, "_FURTHER", 2)
        yield made


@settings(max_examples=300, deadline=None)
@given(lines=FILES)
def test_both_readers_do_as_the_rules_say(folder: Path, lines: list[dict[str, Any]]) -> None:
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "a": 7')
    expected = oracle(lines)
    assert series(of_rows(metrics.read(folder))) == series(expected)
    history = assemble(read_folder(file, "run"))
    theirs = zip(history["key"], history["step"].tolist(), history["value"].tolist(), strict=True)
    assert series({(k, s): v for k, s, v in theirs}) == series(expected)
    last = metrics.latest(folder, "a", "b")
    assert repr([last.get(key) for key in ("a", "b")]) == last_of(expected)


@settings(max_examples=300, deadline=None)
@given(lines=FILES, cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_reading_as_a_file_grows_is_reading_it_at_once(
    folder: Path, lines: list[dict[str, Any]], cuts: list[int]
) -> None:
    """Rows, latest values and a store's points agree, wherever the file is cut, even in a line."""
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = folder / "metrics.jsonl"
    file.write_bytes(b"")
    reader, values, points = (
        metrics.MetricsReader(folder),
        metrics.LatestValues(folder, "a", "b"),
        PointReader(folder),
    )
    read: list[dict[str, Any]] = []
    stored: list[tuple[str, int]] = []
    for cut in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        file.write_bytes(text[:cut])
        expected = oracle(lines[: text[:cut].count(b"\n")])
        read += reader.read()
        assert series(of_rows(metrics.valid_rows(read))) == series(expected)
        last = values.read()
        assert repr([last.get(key) for key in ("a", "b")]) == last_of(expected)
        points.read()
        send, past, end = points.next_batch()
        points.mark_delivered(end, past)
        stored += [point[:2] for point in send]
        assert all(repr(expected[point[:2]]) == repr(point[3]) for point in send)
        assert set(stored) >= set(expected)
    assert len(stored) == len(set(stored))
