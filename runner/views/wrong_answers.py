"""The wrong answers of a run by kind, as a table and as a page.

They are read from the answers_NAME.jsonl that evaluations write into a run's folder: `solving`
(problems), `labels` (texts with one of a few labels), `pairs` (answers of which one is preferred).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from math import exp
from pathlib import Path
from string import Template
from typing import Any

from runner.machine.errors import ConfigError, DataError
from runner.machine.storage import write_atomically
from runner.machine.text_files import json_lines

_PAGE = Path(__file__).with_suffix(".html")
_TEXTS = ("prompt", "reference", "given")
_OF_VERDICT = {
    "wrong_arithmetic": "wrong arithmetic",
    "wrong_reasoning": "broken chain",
    "unparsed": "no answer",
}
MEANINGS = {
    "flipped label": "another label, and the model is sure of it",
    "ambiguous label": "another label, hardly likelier than others",
    "wrong arithmetic": "a step whose result is another",
    "broken chain": "every step holds, and the answer is wrong all the same",
    "no answer": "no answer is found in the text",
    "preference violation": "the rejected answer is rewarded more than the chosen one",
}


@dataclass(frozen=True, kw_only=True)
class WrongAnswer:
    """A wrong answer.

    Args:
        evaluation: NAME of answers_NAME.jsonl.
        line: of that file, from 1.
        kind: one of `MEANINGS`.
        prompt, reference, given: what was asked, what is right, and what the model answers or, of a
            preference violation, prefers; empty where texts are left out.
        certainty: probability of a wrong label among the labels, or by how much more the rejected
            answer is rewarded; None of problems.
        right_samples, samples: of problems that were sampled too.
    """

    evaluation: str
    line: int
    kind: str
    prompt: str
    reference: str
    given: str
    certainty: float | None = None
    right_samples: int | None = None
    samples: int | None = None


def wrong_answers(
    folder: Path, *, ambiguous: float = 0.75, texts: bool = True
) -> tuple[list[WrongAnswer], dict[str, int]]:
    """Return the wrong answers in a run's folder, and how many answers each evaluation has.

    Args:
        ambiguous: a wrong label that is less likely than this among the labels is ambiguous.
        texts: False leaves prompts and answers out, which a licence may forbid to publish.

    Raises:
        ConfigError: no evaluation has written answers there.
        DataError: a file is damaged; the message names the line.
    """
    files = sorted(folder.glob("answers_*.jsonl"))
    if not files:
        raise ConfigError(
            f"{folder} has no answers_NAME.jsonl; evaluate the run with eval.also of solving, "
            "labels or pairs (+eval/also@eval.also.NAME=solving)"
        )
    found, totals = [], {}
    for file in files:
        name = file.stem.removeprefix("answers_")
        totals[name] = 0
        for line, (where, row) in enumerate(json_lines(file), start=1):
            totals[name] += 1
            try:
                mistake = _mistake(row, ambiguous)
                if mistake is not None:
                    mistake |= {key: row[key] for key in ("prompt", "reference")}
                    mistake |= {} if texts else dict.fromkeys(_TEXTS, "")
                    found.append(WrongAnswer(evaluation=name, line=line, **mistake))
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"{where} is no line of answers ({error!r}); run the evaluation again"
                ) from None
    return found, totals


def _mistake(row: Mapping[str, Any], ambiguous: float) -> dict[str, Any] | None:
    """Return kind, given and further fields of a line of answers, None if it is right."""
    if "margin" in row:
        if row["margin"] >= 0:
            return None
        kind = "preference violation"
        return {"kind": kind, "given": row["rejected"], "certainty": -row["margin"]}
    if "log_probabilities" in row:
        if row["greedy"] == row["reference"]:
            return None
        certainty = exp(row["log_probabilities"][row["greedy"]])
        kind = "ambiguous label" if certainty < ambiguous else "flipped label"
        return {"kind": kind, "given": row["greedy"], "certainty": certainty}
    if row["verdict"] == "right":
        return None
    mistake = {"kind": _OF_VERDICT[row["verdict"]], "given": row["greedy"]}
    if row["right"]:
        mistake |= {"right_samples": sum(row["right"]), "samples": len(row["right"])}
    return mistake


def counts(
    found: Sequence[WrongAnswer], totals: Mapping[str, int]
) -> Iterator[tuple[str, str, int, int]]:
    """Yield (evaluation, kind, how many, answers of the evaluation), the most frequent first."""
    for (name, kind), number in Counter((one.evaluation, one.kind) for one in found).most_common():
        yield name, kind, number, totals[name]


def write_table(found: Sequence[WrongAnswer], file: Path) -> None:
    """Write the wrong answers as parquet, a row for each."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    types = {"line": pa.int64(), "certainty": pa.float64()}
    types |= dict.fromkeys(("right_samples", "samples"), pa.int64())
    names = [field.name for field in fields(WrongAnswer)]
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    pq.write_table(pa.Table.from_pylist([asdict(one) for one in found], schema), file)


def write_page(
    found: Sequence[WrongAnswer], totals: Mapping[str, int], name: str, file: Path
) -> None:
    """Write the wrong answers as a page, those of a kind together, the surest first."""
    kinds = "".join(
        f'<tr><td class="text">{escape(evaluation)}</td><td class="text">{kind}</td>'
        f'<td class="text">{MEANINGS[kind]}</td><td>{number}</td>'
        f"<td>{100 * number / total:.1f}%</td></tr>\n"
        for evaluation, kind, number, total in counts(found, totals)
    )
    order = sorted(found, key=lambda one: (one.evaluation, one.kind, -(one.certainty or 0.0)))
    text = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        name=escape(name),
        summary=", ".join(f"{name}: {number} answers" for name, number in totals.items()),
        kinds=kinds,
        rows="".join(map(_row, order)),
    )
    write_atomically(file, text)


def _row(one: WrongAnswer) -> str:
    sampled = "" if one.samples is None else f"{one.right_samples} of {one.samples}"
    certainty = "" if one.certainty is None else f"{one.certainty:.3g}"
    texts = "".join(
        f'<td class="text"><pre>{escape(text)}</pre></td>'
        for text in (getattr(one, name) for name in _TEXTS)
    )
    head = f"<td>{one.line}</td><td>{escape(one.evaluation)}</td><td>{one.kind}</td>"
    return f"<tr>{head}{texts}<td>{certainty}</td><td>{sampled}</td></tr>\n"
