"""Rows as answers to a prompt; whatever is wrong with one is named by its place."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runner.data.chat_template import Message
from runner.data.conversation_rows import (
    alpaca_question,
    refuse_disorder,
    text_of,
    turns,
    value_of,
)
from runner.data.judged_answers_config import AnswerSource
from runner.machine.errors import DataError
from runner.machine.system_errors import reading
from runner.machine.text_files import as_text

_SPOKEN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
DROP = "mend or remove the row, or give data.sources.0.unusable=drop"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Args:
        where: its place, for messages of errors.
        prompt: messages {"role", "content"}.
        steps: the parts of the answer, which are joined by line breaks.
        labels: of each step, in [0, 1]; empty where there are none.
    """

    where: str
    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The whole answer."""
        return "\n".join(self.steps)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that it ends."""
        return (*self.prompt, {"role": "assistant", "content": self.text})


def examples(
    source: AnswerSource, read: Callable[[Row, str, str], tuple[Answer, ...]]
) -> Iterator[tuple[Answer, ...] | None]:
    """Yield the answers of each row of a source, None for one that is dropped.

    Args:
        read: returns the answers of a row, given its place and the source's layout.

    Raises:
        DataError: a row is of another layout or nothing can be learnt from it, or all rows are
            dropped; the message names file and line.
    """
    used, reason = 0, None
    with reading(source.path):
        for where, row in source.rows():
            try:
                if not isinstance(row, Mapping):
                    raise DataError(f"{where} is no JSON object; layout={source.layout} needs one")
                answers = read(row, where, source.layout)
                for answer in answers:
                    refuse_disorder(answer.messages, where)
            except DataError as error:
                if source.unusable == "refuse":
                    raise
                reason = error
                yield None
                continue
            used += 1
            yield answers
        if reason is not None and not used:
            raise DataError(f"{source.path}: no row can be used; of the last: {reason}")


def pair(row: Row, where: str, layout: str) -> tuple[Answer, ...]:
    """Return (the chosen answer, the rejected one) of a row.

    Raises:
        DataError: there are no two answers to one prompt, or they are equal.
    """
    if layout == "alpaca":
        question = alpaca_question(row, where)
        prompt: list[Message] | None = [{"role": "user", "content": question}]
    else:
        prompt = _prompt(row, where) if "prompt" in row else None
    chosen = _said(row, where, "chosen", layout)
    rejected = _said(row, where, "rejected", layout)
    if prompt is None:
        prompt = chosen[:-1]
        if not prompt or rejected[:-1] != prompt:
            raise DataError(
                f"{where}: without a `prompt`, chosen and rejected must be conversations that "
                f"differ in the last answer only; {DROP}"
            )
    answers = [
        Answer(where, tuple(prompt), (_only_answer(said, prompt, f"{where}, {name}"),))
        for name, said in (("chosen", chosen), ("rejected", rejected))
    ]
    if answers[0].text == answers[1].text:
        raise DataError(
            f"{where}: chosen and rejected are equal, nothing can be learnt from them; {DROP}"
        )
    return tuple(answers)


def solution(row: Row, where: str, layout: str) -> tuple[Answer, ...]:
    """Return the answers of a row with their labels: one, or a pair.

    Raises:
        DataError: a label is unknown, the number of steps and of labels differs, or see `pair`.
    """
    if layout not in ("labelled", "steps"):
        chosen, rejected = pair(row, where, layout)
        return replace(chosen, labels=(1.0,)), replace(rejected, labels=(0.0,))
    if layout == "labelled":
        steps, labels = [text_of(row, where, "answer")], [value_of(row, where, "label")]
    else:
        steps, labels = _list(row, where, "steps"), _list(row, where, "labels")
        if len(steps) != len(labels):
            raise DataError(f"{where}: {len(steps)} steps, {len(labels)} labels; {DROP}")
        steps = [as_text(step, f"{where}, step {n}") for n, step in enumerate(steps, start=1)]
        if not all(step.strip() for step in steps):
            raise DataError(f"{where}: a step is empty; {DROP}")
    known = tuple(_label(label, where) for label in labels)
    return (Answer(where, tuple(_prompt(row, where)), tuple(steps), known),)


def _label(label: Any, where: str) -> float:
    known = isinstance(label, (bool, int, float)) and 0 <= label <= 1  # NaN is not
    if not known:
        raise DataError(
            f"{where}: label={label!r} is unknown; give true, false or a number in [0, 1], or drop "
            "such rows by data.sources.0.unusable=drop"
        )
    return float(label)


def _list(row: Row, where: str, field: str) -> list[Any]:
    given = value_of(row, where, field)
    if not isinstance(given, Sequence) or isinstance(given, str) or not len(given):
        raise DataError(f"{where}: {field} must be a list; {DROP}")
    return list(given)


def _prompt(row: Row, where: str) -> list[Message]:
    given = value_of(row, where, "prompt")
    if given is None or isinstance(given, str):
        return [{"role": "user", "content": as_text(given, f"{where}, prompt")}]
    return _messages(row, where, "prompt")


def _messages(row: Row, where: str, field: str) -> list[Message]:
    said = turns(row, f"{where}, {field}", field, "role", "content")
    return [{"role": role, "content": text} for role, text in said]


def _said(row: Row, where: str, field: str, layout: str) -> list[Message]:
    """Return the messages in `field`: an answer, or a conversation that ends with it."""
    given = value_of(row, where, field)
    if layout == "hh":
        return _spoken(as_text(given, f"{where}, {field}"), f"{where}, {field}")
    if given is None or isinstance(given, str):
        return [{"role": "assistant", "content": as_text(given, f"{where}, {field}")}]
    return _messages(row, where, field)


def _spoken(text: str, where: str) -> list[Message]:
    before, *parts = _SPOKEN.split(text)
    if before.strip() or not parts:
        raise DataError(f"{where} is no transcript of Human: and Assistant:; {DROP}")
    return [
        {"role": _ROLE[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _only_answer(said: Sequence[Message], prompt: Sequence[Message], where: str) -> str:
    """Return the answer that is left of a conversation without its prompt."""
    rest = said[len(prompt) :] if list(said[: len(prompt)]) == list(prompt) else said
    if len(rest) != 1 or rest[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in rest) or "nothing"
        raise DataError(
            f"{where}: one answer of the assistant must follow the prompt, not: {roles}; {DROP}"
        )
    answer: str = rest[0]["content"]
    return answer
