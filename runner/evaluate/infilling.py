"""Middles filled in by a masked-diffusion model: run with tests, or compared with the text."""

import ast
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.data.corpus import end_ids
from runner.data.sum_lines import SumLinesConfig
from runner.evaluate.infilling_config import InfillingConfig
from runner.evaluate.sandbox import choose_wall, run
from runner.generate.canvas_row import around
from runner.generate.denoising import Denoising
from runner.generate.generate import completions, make_engine, requests_of
from runner.machine.errors import ConfigError, DataError
from runner.machine.text_files import json_lines
from runner.records.contracts import Trained, strategy


@dataclass(frozen=True)
class Question:
    """A text with its middle taken out.

    Args:
        test: a program that follows it and fails where the middle is wrong ("": there is none).
    """

    prefix: str
    middle: str
    suffix: str
    test: str = ""

    def whole(self, middle: str) -> str:
        """Return the text with `middle` put in."""
        return f"{self.prefix}{middle}{self.suffix}"


def infilling(cfg: InfillingConfig, trained: Trained) -> dict[str, float]:
    """Return the scores of `InfillingConfig.run`.

    Raises:
        ConfigError: the model fills in no canvas, or programs must run and there is no sandbox.
        DataError: the file holds no question.
    """
    if cfg.file is None:
        questions = list(_sums(cfg.sums, cfg.digits))
    else:
        questions = read_questions(Path(cfg.file), cfg.limit)
    if any(question.test for question in questions):
        choose_wall(cfg.allow_unsafe_code)
    values: dict[str, float] = {}
    per_canvas: dict[str, list[float]] = {}
    for canvas in cfg.canvases:
        filled = _filled(cfg, trained, questions, canvas)
        scores = [
            scored(question, text, error, unsafe=cfg.allow_unsafe_code)
            for question, (text, error) in zip(questions, filled, strict=True)
        ]
        for name in scores[0]:
            mean, stderr = _mean([row[name] for row in scores])
            values[f"{cfg.name}/{name}@{canvas}"] = mean
            values[f"{cfg.name}/{name}@{canvas}_stderr"] = stderr
            per_canvas.setdefault(name, []).append(mean)
    return values | {f"{cfg.name}/{k}": sum(v) / len(v) for k, v in per_canvas.items()}


def read_questions(file: Path, limit: int | None = None) -> list[Question]:
    """Return the questions of a file, or at most `limit` evenly spaced ones.

    Raises:
        DataError: it cannot be read, a row is of neither form, or there is no question.
    """
    questions = [question for where, row in json_lines(file) for question in _of_row(where, row)]
    if not questions:
        raise DataError(f"{file} holds no question; rows need prompt and suffix, or text of Python")
    count = len(questions)
    taken = min(limit or count, count)
    return [questions[index * count // taken] for index in range(taken)]


def _sums(count: int, digits: int) -> Iterator[Question]:
    """Yield sums between two others, none of them from the default seed of data=sum_lines."""
    lines = [*SumLinesConfig(lines=3 * count, digits=digits, data_seed=1 << 20).sums()]
    for before, (asked, answer), after in zip(*(lines[i::3] for i in range(3)), strict=True):
        yield Question("".join(before) + f"\n{asked}", answer, "\n" + "".join(after) + "\n")


def _of_row(where: str, row: Any) -> Iterator[Question]:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        yield from held_out_lines(row["text"])
        return
    names = ("prompt", "suffix", "canonical_solution")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
        raise DataError(f"{where} has no text in {', '.join(names)}, and none in text; mend it")
    test = f"{row['test']}\ncheck({row['entry_point']})" if "test" in row else ""
    yield Question(row["prompt"], row["canonical_solution"], row["suffix"], test)


def held_out_lines(text: str) -> Iterator[Question]:
    """Yield each function of a Python text with one line of its body held out, the middle one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        single = [part.lineno for part in node.body if part.lineno == part.end_lineno]
        if not single:
            continue
        at, first, last = single[len(single) // 2] - 1, node.lineno - 1, node.end_lineno
        prefix, middle, suffix = lines[first:at], lines[at], lines[at + 1 : last]
        yield Question("".join(prefix), middle, "".join(suffix))


def _filled(
    cfg: InfillingConfig, trained: Trained, questions: Sequence[Question], canvas: int
) -> list[tuple[str, int]]:
    """Return (middle, its distance from the number of tokens of the true one) of each question."""
    tokenizer, context = trained.corpus.tokenizer, trained.cfg.train.sequence_length
    own = strategy(trained.cfg.task, trained.model, tokenizer, context)
    if own is None or own.settings is not Denoising:
        raise ConfigError(
            "eval.also.infilling needs a model that fills in a canvas: task=diffusion_infill or "
            "task=diffusion, and model.causal=false"
        )
    most = max(canvas, cfg.max_canvas) if own.expand is not None else canvas
    room = context - most
    if room < 4:
        raise ConfigError(
            f"a canvas of {most} leaves no room for a text in train.sequence_length={context}; "
            "give smaller eval.also.infilling.canvases, or longer sequences"
        )
    prompts, how = [], []
    for number, question in enumerate(questions):
        before, after = around(tokenizer, question.prefix, question.suffix, room)
        prompts.append(torch.tensor(before))
        how.append(
            Denoising(
                max_new_tokens=canvas,
                suffix=tuple(after),
                steps=min(cfg.steps, canvas) if cfg.steps else None,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                max_canvas=most,
                sample=number,
            )
        )
    ends = end_ids(tokenizer)
    engine = make_engine(
        trained.model,
        context=context,
        decode=tokenizer.decode,
        ends=ends,
        rows=cfg.batch_size,
        strategy=own,
    )
    with trained.precision.autocast():
        done = list(completions(engine, requests_of(engine, prompts, how)))
    return [
        (text.text, abs(len(text.ids) - len(tokenizer.encode(question.middle))))
        for text, question in zip(done, questions, strict=True)
    ]


def scored(
    question: Question, middle: str, error: int, *, unsafe: bool = False
) -> dict[str, float]:
    """Return the scores of one middle, `error` tokens away from the length of the true one."""
    exact = _same_text(question.middle, middle)
    scores = {
        "exact_match": float(exact),
        "same_ast": float(exact or same_ast(question, middle)),
        "length_error": float(error),
    }
    if question.test:
        program = f"{question.whole(middle)}\n{question.test}"
        scores["pass_at_1"] = float(run(program, wall=choose_wall(unsafe)).passed)
    return scores


def _same_text(true: str, middle: str) -> bool:
    """Return whether a middle is the true one; where that is a line, whether its first line is."""
    is_line = true.endswith("\n") and true.count("\n") == 1
    return (first_line(middle) if is_line else middle.strip()) == true.strip()


def first_line(text: str) -> str:
    """Return a text's first line, or the second if it begins with an empty one (SantaCoder-FIM)."""
    return text.removeprefix("\n").partition("\n")[0].strip()


def same_ast(question: Question, middle: str) -> bool:
    """Return whether a middle gives the same syntax tree as the true one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            ours, theirs = (
                ast.dump(ast.parse(textwrap.dedent(question.whole(part))))
                for part in (middle, question.middle)
            )
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return ours == theirs


def _mean(scores: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN of a single one."""
    values = torch.tensor(scores, dtype=torch.float64)
    stderr = float(values.std()) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    return float(values.mean()), stderr
