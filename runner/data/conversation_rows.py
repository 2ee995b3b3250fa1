"""Rows of the layouts in use as conversations; whatever is wrong with one is named by its place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from re import compile as pattern
from typing import Any

from runner.data.chat_template import Message
from runner.data.conversations_config import ConversationSource, Layout
from runner.machine.errors import DataError
from runner.machine.system_errors import reading
from runner.machine.text_files import as_text

_ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLE = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}
_BEFORE = {"system": (None,), "user": (None, "system", "assistant"), "tool": ("assistant",)}
_BEFORE["assistant"] = ("user", "tool")
_CALL = pattern(r"<<[^<>]*>>")
RESULT = pattern(r"<<[^<>=]*=([^<>]*>>)")  # what a calculator puts after the "=" of a call


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer.

    Args:
        where: its place, for messages of errors.
        messages: {"role", "content"}, in order.
        calls: whether "<<48/2=24>>" in an answer is a call, whose result is no target.
    """

    where: str
    messages: tuple[Message, ...]
    calls: bool = False


def conversations(source: ConversationSource) -> Iterator[Conversation]:
    """Yield the conversations of a source.

    Raises:
        DataError: a row is of another layout, its roles are out of order, a message holds no text,
            or there is no answer; the message names file and line.
    """
    calls = source.layout == "gsm8k" and source.calculator
    with reading(source.path):
        for where, row in source.rows():
            if not isinstance(row, Mapping):
                raise DataError(f"{where} is no JSON object; layout={source.layout} needs one")
            said = _READERS[source.layout](row, where)
            if source.layout == "gsm8k" and not source.calculator:
                said = [(role, _CALL.sub("", text)) for role, text in said]
            messages = tuple({"role": role, "content": text} for role, text in said)
            refuse_disorder(messages, where)
            yield Conversation(where, messages, calls)


def parts_of_answer(text: str, *, calls: bool) -> Iterator[tuple[str, bool]]:
    """Yield the parts of an answer in order, of each whether a calculator gives it.

    The last one is the model's own. Without `calls` it is the whole text.
    """
    at = 0
    for found in RESULT.finditer(text) if calls else ():
        yield text[at : found.start(1)], False
        yield found.group(1), True
        at = found.end(1)
    yield text[at:], False


Said = list[tuple[str, str]]


def _messages(row: Mapping[str, Any], where: str) -> Said:
    return turns(row, where, "messages", "role", "content")


def _sharegpt(row: Mapping[str, Any], where: str) -> Said:
    return turns(row, where, "conversations", "from", "value")


def turns(row: Mapping[str, Any], where: str, field: str, role: str, content: str) -> Said:
    """Return (role, text) of each message of the list `field` of a row.

    Raises:
        DataError: it is no list of messages, or a message has no text.
    """
    given = value_of(row, where, field)
    if not isinstance(given, Sequence) or isinstance(given, str) or not len(given):
        raise DataError(
            f"{where}: {field}={given!r:.60} must be a list of messages; mend or remove the row"
        )
    said = []
    for number, turn in enumerate(given, start=1):
        place = f"{where}, message {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place} is no object with {role} and {content}; mend or remove it")
        name = as_text(value_of(turn, place, role), f"{place}, {role}")
        said.append((_SAME_ROLE.get(name, name), as_text(value_of(turn, place, content), place)))
    return said


def _alpaca(row: Mapping[str, Any], where: str) -> Said:
    return [("user", alpaca_question(row, where)), ("assistant", text_of(row, where, "output"))]


def alpaca_question(row: Mapping[str, Any], where: str) -> str:
    """Return `instruction` and, where there is one, `input` of a row as one text."""
    parts = [
        text_of(row, where, "instruction"),
        "" if row.get("input") is None else text_of(row, where, "input"),
    ]
    return "\n\n".join(part for part in parts if part)


def _gsm8k(row: Mapping[str, Any], where: str) -> Said:
    return [("user", text_of(row, where, "question")), ("assistant", text_of(row, where, "answer"))]


def text_of(row: Mapping[str, Any], where: str, field: str) -> str:
    """Return the text in the field of a row.

    Raises:
        DataError: there is no such field, or it holds no text.
    """
    return as_text(value_of(row, where, field), f"{where}, {field}")


def value_of(row: Mapping[str, Any], where: str, field: str) -> Any:
    """Return the value in the field of a row.

    Raises:
        DataError: there is no such field.
    """
    if field not in row:
        raise DataError(
            f"{where} has no {field!r}; it has {', '.join(map(str, row))}; give the layout of the "
            "source: data.sources.0.layout=NAME"
        )
    return row[field]


def refuse_disorder(messages: Sequence[Message], where: str) -> None:
    """Check that the roles are in order, that no answer is empty and that an answer ends it.

    Raises:
        DataError: one of them is not so; the message names the place.
    """
    before = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in _ROLES:
            raise DataError(
                f"{where}, message {number}: role={role!r} is none of: {', '.join(_ROLES)}"
            )
        if before not in _BEFORE[role]:
            raise DataError(
                f"{where}, message {number}: roles out of order, {role} after "
                f"{before or 'nothing'}; mend or remove the row"
            )
        if role == "assistant" and not message["content"].strip():
            raise DataError(
                f"{where}, message {number}: the answer is empty, nothing can be learnt from it; "
                "mend or remove the row"
            )
        before = role
    if before != "assistant":
        raise DataError(
            f"{where}: the last message is of role {before}, its answer is missing; mend or remove "
            "the row"
        )


_READERS: dict[Layout, Callable[[Mapping[str, Any], str], Said]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "gsm8k": _gsm8k,
}
