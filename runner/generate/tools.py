"""Tools that a model may call while it writes, and how a call and its answer stand in the text.

    inline   a call stands between two marks within a turn: <<48/2=
    turn     a whole turn of the assistant is a call: <find> address ; Name <tool>

What follows a call is forced: the model reads the tool's answer, it does not choose it. Text that
a tool gives is encoded without special tokens, so that none of it can end a turn or begin a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

from runner.data.corpus import encode_literally, token_id
from runner.data.dialogue_format import DialogueFormat, dialogue_format

_NEAR = 8  # newest tokens that are decoded, at least, to see whether a mark ends there


@runtime_checkable
class Tool(Protocol):
    """A tool, `conf/tool/x.yaml`; the config class itself. It is called in a thread of its own.

    Optional:
        opens, closes: what an inline call stands between: a special token by its name, or text.
            Without them the tool reads whole turns.
        before, after: what is written before and after the answer of an inline call (default: "").
        claims: claims(text) says whether a turn of the assistant is a call of this tool (default:
            every turn that ends as a call may).
        timeout_s: seconds after which the answer is no longer awaited (default: 3).
        for_run: for_run(config) returns the tool for a run of this config (default: itself).
    """

    def __call__(self, text: str) -> str:
        """Return the answer to a call; what it raises is answered by an error, and counted."""


@dataclass(frozen=True)
class Call:
    """A call that a text has ended with.

    Args:
        text: what the tool is given.
        before, after: ids around the answer.
    """

    tool: Tool
    text: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@runtime_checkable
class Calls(Protocol):
    """How calls of some tools stand in a text."""

    def find(self, turn: Sequence[int]) -> Call | None:
        """Return the call that the newest id completes.

        Args:
            turn: what the model has chosen since it began, or since the last answer.
        """


@dataclass(frozen=True)
class Tools:
    """What the model of a request may call.

    Args:
        calls: how, in the order in which they are asked.
        encode: returns the ids of what a tool says.
        max_calls: the most calls of one text; a further one ends it ("length").
        error: what the model reads where a tool fails or takes too long.
        max_characters: of an answer; the model does not read what is beyond.
    """

    calls: Sequence[Calls]
    tokenizer: Any = field(repr=False)
    max_calls: int = 16
    error: str = "error"
    max_characters: int = 1 << 14

    def find(self, turn: Sequence[int]) -> Call | None:
        """Return the call that the newest id of a turn completes."""
        found = (calls.find(turn) for calls in self.calls)
        return next((call for call in found if call is not None), None)

    def answer(self, call: Call, text: str | None) -> list[int]:
        """Return the ids that follow a call; `text` is what the tool said, None if it failed.

        What the tokenizer has no ids for is a failure too; where it has none for `error`, as one of
        the characters of a training text may, nothing is said.
        """
        for said in (self.error if text is None else text, self.error):
            try:
                own = self._encode(said)
            except Exception:  # a tokenizer is somebody else's too, and others of the batch go on
                continue
            return [*call.before, *own, *call.after]
        return [*call.before, *call.after]

    def _encode(self, text: str) -> list[int]:
        read = text[: self.max_characters]
        readable = read.encode(errors="replace").decode()  # half a surrogate pair has no encoding
        ids: list[int] = encode_literally(self.tokenizer, readable).tolist()
        return ids


def tools_for(
    tools: Sequence[Tool], tokenizer: Any, *, max_calls: int = 16, error: str = "error"
) -> Tools:
    """Return the tools as a request takes them.

    Raises:
        ValueError: `max_calls` is below 1, a `timeout_s` is no number of seconds, a mark is empty,
            a tool cannot be called, or never would be, as another one takes all its calls.
        ConfigError: a tool reads whole turns, and the tokenizer has no form of dialogues.
    """
    if max_calls < 1:
        raise ValueError(f"max_calls={max_calls} must be at least 1; give no tools for none")
    for tool in tools:
        if not callable(tool):
            raise ValueError(f"{tool} cannot be called: a tool is tool(text), and returns text")
        if not timeout_s(tool) >= 0:
            raise ValueError(f"timeout_s={timeout_s(tool)} of {tool} must be at least 0 seconds")
    inline: list[Any] = [tool for tool in tools if hasattr(tool, "opens")]
    for tool in inline:
        if not (tool.opens and tool.closes):
            raise ValueError(
                f"an inline call of {tool} stands between opens={tool.opens!r} and "
                f"closes={tool.closes!r}; neither may be empty"
            )
    whole = [tool for tool in tools if not hasattr(tool, "opens")]
    _check_told_apart(inline, whole)
    calls: list[Calls] = [InlineCalls(tool, tokenizer) for tool in inline]
    if whole:
        calls.append(TurnCalls(whole, tokenizer, dialogue_format(tokenizer)))
    return Tools(tuple(calls), tokenizer, max_calls, error)


def _check_told_apart(inline: Sequence[Any], whole: Sequence[Any]) -> None:
    marks = [(tool.opens, tool.closes) for tool in inline]
    for opens, closes in marks:
        if marks.count((opens, closes)) > 1:
            raise ValueError(
                f"two tools are called between {opens!r} and {closes!r}, and only the first would "
                "be; give the other one marks of its own (opens, closes)"
            )
    greedy = [tool for tool in whole[:-1] if not hasattr(tool, "claims")]
    if greedy or any(tool is other or tool == other for tool, other in combinations(whole, 2)):
        raise ValueError(
            f"{[*greedy, *whole][0]} takes every call of whole turns, and a later tool would never "
            "be called; give it claims(text), or put it last and once"
        )


def for_run(tool: Any, config: Any) -> Tool:
    """Return the tool for a run of `config`."""
    own = getattr(tool, "for_run", None)
    made: Tool = tool if own is None else own(config)
    return made


def timeout_s(tool: Tool) -> float:
    """Return the seconds that an answer of `tool` is awaited."""
    return float(getattr(tool, "timeout_s", 3.0))


class InlineCalls:
    """Calls between two marks; the innermost of nested ones counts."""

    def __init__(self, tool: Any, tokenizer: Any) -> None:
        self.tool, self.tokenizer = tool, tokenizer
        self.opens, self.closes = (_mark(tokenizer, text) for text in (tool.opens, tool.closes))
        self._near = max(_NEAR, len(tool.closes.encode()) + 1)  # a token is a byte at least
        self.before, self.after = (
            tuple(_ids(tokenizer, getattr(tool, name, ""))) for name in ("before", "after")
        )

    def find(self, turn: Sequence[int]) -> Call | None:
        """See `Calls`."""
        if isinstance(self.closes, int):
            if turn[-1] != self.closes:
                return None
            turn = turn[:-1]
        elif not self.tokenizer.decode(turn[-self._near :]).endswith(self.closes):
            return None
        if isinstance(self.opens, int):
            if self.opens not in turn:
                return None
            turn = turn[len(turn) - list(turn)[::-1].index(self.opens) :]
        text = self.tokenizer.decode(turn)
        text = text.removesuffix(self.closes) if isinstance(self.closes, str) else text
        if isinstance(self.opens, str):
            _, mark, text = text.rpartition(self.opens)
            if not mark:
                return None
        return Call(self.tool, text, self.before, self.after)


class TurnCalls:
    """Turns of the assistant that are calls."""

    def __init__(self, tools: Sequence[Any], tokenizer: Any, form: DialogueFormat) -> None:
        self.tools, self.tokenizer, self.form = tools, tokenizer, form
        before, after = form.around_answer()
        self.before, self.after = tuple(before), tuple(after)

    def find(self, turn: Sequence[int]) -> Call | None:
        """See `Calls`."""
        if not self.form.ends_call(turn[-1]):
            return None
        text = self.tokenizer.decode(turn[:-1])
        for tool in self.tools:
            if _claims(tool, text):
                return Call(tool, text, self.before, self.after)
        if self.form.marks_calls:  # what no tool claims is a mistake, which the first one answers
            return Call(self.tools[0], text, self.before, self.after)
        return None


def _claims(tool: Any, text: str) -> bool:
    try:
        return bool(tool.claims(text)) if hasattr(tool, "claims") else True
    except Exception:  # as the call itself would fail: the model reads the error, others go on
        return True


def _mark(tokenizer: Any, text: str) -> int | str:
    """Return the id of a special token, or the text itself."""
    index = token_id(tokenizer, text)
    return text if index is None else index


def _ids(tokenizer: Any, text: str) -> list[int]:
    mark = _mark(tokenizer, text)
    return [mark] if isinstance(mark, int) else tokenizer.encode(text).tolist()  # type: ignore[no-any-return]
