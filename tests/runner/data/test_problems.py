"""Problems with solutions, their answers, and the arithmetic written out in them."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from runner.data.answer_parsers import MarkedNumber
from runner.data.arithmetic import number, steps, value_of, verdict, written
from runner.data.problems import encode, prepare, prompts_and_solutions
from runner.data.problems_config import Problem, ProblemFile, ProblemsConfig
from runner.data.sums_config import SumsConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import DataError

BYTES = TokenizerConfig(kind="bytes")
DATA = Path(__file__).parents[4] / "shared/data/gsm8k"
needs_gsm8k = pytest.mark.skipif(not DATA.exists(), reason=f"needs the reference data in {DATA}")


@needs_gsm8k
def test_all_1319_gold_answers_of_gsm8k_are_parsed() -> None:
    rows = [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]
    parsed = [MarkedNumber().parse(row["answer"]) for row in rows]
    gold = [str(number(row["answer"].rpartition("####")[2])) for row in rows]
    assert parsed == gold
    assert len(parsed) == 1319


@needs_gsm8k
def test_all_23716_calculations_of_gsm8k_hold() -> None:
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    claims = [step.holds for row in rows for step in steps(row["answer"])]
    assert len(claims) == 23716
    assert all(claims)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 9 eggs\n#### 18", "18"),
        ("#### $1,000.50", "2001/2"),
        ("#### -3.", "-3"),
        ("#### 5 #### 6", "5"),
        ("#### 007", "7"),
        ("18", None),
        ("####", None),
        ("#### x", None),
        ("#### 1.2.3", None),
        ("#### 12/4 #### 3", None),
        ("#### 10:30", None),
        ("#### 1e3", None),
        ("#### 1,5", None),
        ("#### 1,234,567 eggs", "1234567"),
        ("#### 50%", "50"),
    ],
)
def test_the_number_after_the_first_mark_is_the_answer(text: str, answer: str | None) -> None:
    assert MarkedNumber().parse(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("-4/8", Fraction(-1, 2)),
        (".5*1,000", 500),
        ("0.1+0.2", Fraction(3, 10)),
        ("7//2", 3),
        ("012+3", 15),
    ],
)
def test_expressions_have_their_exact_value(text: str, value: Fraction) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "1+", "2**9999999", "9**9", "__import__('os')", "1/0", "1;2", "a", "1e9", "(" * 99, "1 2"],
)
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expression|parsed|zero|none of"):
        value_of(text)


def test_a_calculator_shows_whole_numbers_and_four_digits() -> None:
    shown = [written(value_of(text)) for text in ("8/2", "1/8", "1/3", "-1/2")]
    assert shown == ["4", "0.125", "0.3333", "-0.5"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<12+34=46><46+56=102>#102", "right"),
        ("<12+34=47><47+56=103>#103", "wrong_arithmetic"),
        ("<12+34=46><46+65=111>#111", "wrong_reasoning"),
        ("<12+34=46><46+56=102>", "unparsed"),
        ("<12+=46>#103", "wrong_arithmetic"),
        ("#103", "wrong_reasoning"),
    ],
)
def test_errors_are_split_by_their_kind(text: str, found: str) -> None:
    assert verdict(text, MarkedNumber(mark="#").parse(text), "102") == found


def test_sums_are_right_distinct_and_drawn_by_their_seed() -> None:
    problems = list(SumsConfig(count=3000).problems())
    assert len({one.prompt for one in problems}) == 3000
    for one in problems:
        numbers = one.prompt.removesuffix(":")
        assert all(step.holds for step in steps(one.solution))
        assert MarkedNumber(mark="#").parse(one.solution) == str(value_of(numbers))
    assert problems[:5] == list(SumsConfig(count=5).problems())
    assert problems[:5] != list(SumsConfig(count=5, data_seed=1).problems())
    pairs = list(SumsConfig(kind="pairs").documents())
    assert len(set(pairs)) == len(pairs) == 17010
    assert all(value_of(left) == int(right) for left, _, right in map(_cut, pairs[:500]))
    with pytest.raises(ValueError, match="count=0 must be in 1 to 729000"):
        SumsConfig(count=0)


def _cut(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def test_the_solution_and_its_end_are_learnt_and_no_problem_is_in_both_splits() -> None:
    data = ProblemsConfig(sources=(SumsConfig(count=400),), val_fraction=0.25)
    corpus = prepare(data, BYTES)
    assert len(corpus.train) + len(corpus.val) == 400
    assert 70 <= len(corpus.val) <= 130
    samples = corpus.samples(48, seed=3)
    epoch = [samples[index] for index in range(len(corpus.train))]
    texts = [corpus.tokenizer.decode(p) for one in epoch for p, _ in _problems(one)]
    assert len(set(texts)) == len(corpus.train), "an epoch has each problem once"
    held_out = [p for batch in corpus.held_out(48, 16, 10**6) for p, _ in _read(batch)]
    assert not set(texts) & {corpus.tokenizer.decode(p) for p in held_out}
    assert len(held_out) == len(corpus.val)
    prompt, solution = _problems(epoch[0])[0]
    assert solution[-1] == corpus.tokenizer.eos
    assert corpus.tokenizer.decode(prompt).endswith(":")
    answer = MarkedNumber(mark="#").parse(corpus.tokenizer.decode(solution))
    assert answer == str(value_of(corpus.tokenizer.decode(prompt)[:-1]))


def _problems(sample: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    return _read({key: value[None] for key, value in sample.items()})


def _read(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    return list(prompts_and_solutions(batch))


def test_problems_of_a_file_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    file = tmp_path / "gsm.jsonl"
    rows = [{"question": f"{i} eggs?", "answer": f"#### {i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ProblemFile(
        path=str(file), prompt="question", solution="answer", form="Question: {}\nAnswer: "
    )
    first = next(source.problems())
    assert (first.prompt, first.solution) == ("Question: 0 eggs?\nAnswer: ", "#### 0")
    corpus = prepare(ProblemsConfig(sources=(source,)), BYTES)
    assert corpus.statistics(10) == {
        "train_problems": len(corpus.train),
        "train_too_long": len(corpus.train),
        "val_problems": len(corpus.val),
        "val_too_long": len(corpus.val),
    }
    with pytest.raises(DataError, match=r"none of the \d+ problems .* raise train.sequence_length"):
        corpus.samples(10, seed=0)
    with pytest.raises(DataError, match=r"gsm.jsonl, line 1 has no 'prompt'; it has question"):
        list(ProblemFile(path=str(file)).problems())
    file.write_text(json.dumps({"prompt": "1", "solution": " "}) + "\n")
    with pytest.raises(DataError, match=r"gsm.jsonl, line 1: solution is empty"):
        list(ProblemFile(path=str(file)).problems())
    file.write_text(json.dumps({"prompt": None, "solution": "x"}) + "\n")
    with pytest.raises(DataError, match=r"gsm.jsonl, line 1"):
        list(ProblemFile(path=str(file)).problems())
    with pytest.raises(
        ValueError, match=r"train.tsv is a table, .* texts with labels are data=sst2"
    ):
        ProblemFile(path="train.tsv")
    with pytest.raises(DataError, match="the prompt has no token"):
        encode(BYTES.build(()), Problem("here", "", "x"))
    empty = {"tokens": torch.zeros(1, 4), "targets": torch.full((1, 4), -100)}
    with pytest.raises(DataError, match="no target"):
        _read(empty)
