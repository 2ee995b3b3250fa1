"""Wrong answers of a run by kind: counted, as a table and as a page."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from runner.machine.errors import ConfigError, DataError
from runner.views.wrong_answers import MEANINGS, counts, write_page, write_table, wrong_answers


def _solved(greedy: str, verdict: str, right: list[bool]) -> dict[str, Any]:
    asked = {"prompt": "1+2+3:", "reference": "6", "greedy": greedy, "verdict": verdict}
    return asked | {"samples": ["#6"] * len(right), "right": right, "scores": [], "tokens": []}


def _labelled(reference: str, positive: float) -> dict[str, Any]:
    shares = {"negative": math.log(1 - positive), "positive": math.log(positive)}
    given = max(shares, key=lambda word: shares[word])
    asked = {"where": "x.tsv, line 1", "prompt": "a <b>film</b>", "reference": reference}
    return asked | {"greedy": given, "calibrated": given, "log_probabilities": shares}


ANSWERS = {
    "sums": [
        _solved("<1+2=3><3+3=6>#6", "right", [True, True]),
        _solved("<1+2=4><4+3=7>#7", "wrong_arithmetic", [True, False]),
        _solved("<1+2=3>#3", "wrong_reasoning", []),
        _solved("?", "unparsed", [False, False]),
    ],
    "sst": [_labelled("negative", 0.9), _labelled("negative", 0.6), _labelled("positive", 0.9)],
    "pairs": [
        {"prompt": "p", "reference": "yes", "rejected": "no", "margin": margin}
        for margin in (0.5, 0.0, -0.25)
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, lines in ANSWERS.items():
        file = tmp_path / f"answers_{name}.jsonl"
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path


def test_every_wrong_answer_has_its_kind_and_line(run: Path) -> None:
    found, totals = wrong_answers(run)
    kinds = {(one.evaluation, one.line): one.kind for one in found}
    assert kinds == {
        ("pairs", 3): "preference violation",
        ("sst", 1): "flipped label",
        ("sst", 2): "ambiguous label",
        ("sums", 2): "wrong arithmetic",
        ("sums", 3): "broken chain",
        ("sums", 4): "no answer",
    }
    assert set(kinds.values()) == set(MEANINGS)
    assert totals == {"pairs": 3, "sst": 3, "sums": 4}
    assert ("sst", "flipped label", 2, 3) in counts(wrong_answers(run, ambiguous=0.5)[0], totals)
    sampled = next(one for one in found if one.kind == "wrong arithmetic")
    assert (sampled.right_samples, sampled.samples) == (1, 2)


def test_table_and_page_hold_them_and_leave_texts_out_where_asked(run: Path) -> None:
    found, totals = wrong_answers(run)
    write_table(found, run / "errors.parquet")
    rows = pq.read_table(run / "errors.parquet").to_pylist()
    assert [row["line"] for row in rows] == [one.line for one in found]
    assert {row["certainty"] for row in rows if row["kind"] == "preference violation"} == {0.25}
    write_page(found, totals, "run <1>", run / "errors.html")
    page = (run / "errors.html").read_text()
    assert page.count("<tr>") == 2 + 2 * len(found), "two heads, kinds, and a row for each"
    assert "a &lt;b&gt;film&lt;/b&gt;" in page
    assert "run &lt;1&gt;" in page
    assert "33.3%" in page
    without, _ = wrong_answers(run, texts=False)
    assert [one.kind for one in without] == [one.kind for one in found]
    assert {one.prompt + one.reference + one.given for one in without} == {""}
    write_table([], run / "none.parquet")
    assert pq.read_table(run / "none.parquet").num_rows == 0


def test_a_run_without_answers_and_damaged_lines_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"no answers_NAME.jsonl; evaluate the run with"):
        wrong_answers(tmp_path / "other")
    file = run / "answers_sums.jsonl"
    file.write_text(file.read_text() + '{"verdict": "wrong_arithmetic"}\n')
    with pytest.raises(DataError, match=r"answers_sums.jsonl, line 5 is no line of answers"):
        wrong_answers(run)
