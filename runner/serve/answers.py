"""From the engine's events to answers, whole or in chunks, of completions and of conversations."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.generate.request import Event, PromptScores, Top
from runner.serve.errors import ApiError, server_error
from runner.serve.requests import Plan
from runner.serve.tools import ToolParser
from runner.serve.vocabulary import Vocabulary

Json = dict[str, Any]


@dataclass
class Text:
    """One continuation, as far as it has come."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    scores: PromptScores | None = None
    num_cached: int = 0

    def add(self, event: Event) -> None:
        """Add what a step has added.

        Raises:
            ApiError: the event is an error.
        """
        if event.error is not None:
            raise error_of(event.error)
        self.ids += event.ids
        self.logprobs += event.logprobs
        self.top += event.top
        self.text += event.text
        self.num_cached += event.num_cached
        self.scores = event.prompt_scores or self.scores
        self.finish = event.finish or None


def error_of(error: Exception) -> ApiError:
    """Return what a client is told of the error that ended its request.

    Where no token was possible, what it asked for is the reason; of a fault of ours no more than
    that there is one.
    """
    if isinstance(error, ValueError):
        return ApiError(400, str(error)[:500], code="no_token_possible")
    return server_error()


class Answer:
    """What the answers of both endpoints have in common.

    Args:
        model_name: what the client is told that it talks to.
        logprobs: give those of each token.
        token_ids: give the ids of prompt and text.
    """

    object, prefix = "", ""

    def __init__(
        self,
        plan: Plan,
        vocabulary: Vocabulary,
        model_name: str,
        *,
        logprobs: bool,
        token_ids: bool,
    ) -> None:
        self.plan, self.vocabulary, self.model_name = plan, vocabulary, model_name
        self.logprobs, self.token_ids = logprobs, token_ids
        self.texts = [Text() for _ in plan.requests]
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self) -> Json:
        """Return the answer that is not streamed; all texts have ended."""
        choices = [self.choice(index, text) for index, text in enumerate(self.texts)]
        return {**self._head(self.object), "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Return how many tokens were read and made: each prompt once, whatever its `n`."""
        prompt = sum(len(ids) for ids in self.plan.prompts)
        made = sum(len(text.ids) for text in self.texts)
        cached = sum(text.num_cached for text in self.texts[:: self.plan.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def choice(self, index: int, text: Text) -> Json:
        """Return a text that has ended."""
        raise NotImplementedError

    def chunks(self, index: int, event: Event) -> Iterator[Json]:
        """Yield what the stream gets of an event, which is added to its text."""
        raise NotImplementedError

    def chunk(self, choices: Sequence[Json], **more: Any) -> Json:
        """Return a chunk of the stream."""
        raise NotImplementedError

    def _head(self, object_: str) -> Json:
        return {
            "id": self.id,
            "object": object_,
            "created": self.created,
            "model": self.model_name,
        }

    def _prompt_of(self, index: int) -> Sequence[int]:
        return self.plan.prompts[index // self.plan.n]


class CompletionAnswer(Answer):
    """The answer of /v1/completions.

    Args:
        echo: the text of the prompt comes first.
    """

    object, prefix = "text_completion", "cmpl"

    def __init__(self, *args: Any, echo: bool, **more: Any) -> None:
        super().__init__(*args, **more)
        self.echo = echo
        self._offsets = [0] * len(self.texts)  # characters given of each text, of its tokens

    def choice(self, index: int, text: Text) -> Json:
        """See `Answer`."""
        before = self._before(index)
        choice = {
            "index": index,
            "text": before + text.text,
            "finish_reason": text.finish,
            "logprobs": self._logprobs(index, text) if self.logprobs else None,
        }
        if self.token_ids:
            choice["prompt_token_ids"] = list(self._prompt_of(index))
            choice["token_ids"] = text.ids
        return choice

    def chunks(self, index: int, event: Event) -> Iterator[Json]:
        """See `Answer`."""
        text = self.texts[index]
        is_first = not text.ids and not text.text and text.finish is None
        part = Text()
        part.add(event)
        before = self._before(index) if is_first and (event.ids or event.finish) else ""
        text.add(event)
        shown = before + part.text
        if not (shown or event.finish or (self.logprobs and event.ids)):
            return
        choice: Json = {
            "index": index,
            "text": shown,
            "finish_reason": part.finish,
            "logprobs": None,
        }
        if self.logprobs:
            choice["logprobs"] = self._logprobs(index, part, prompt=is_first)
        if self.token_ids:
            choice["token_ids"] = part.ids
        yield self.chunk([choice])

    def chunk(self, choices: Sequence[Json], **more: Any) -> Json:
        """See `Answer`."""
        return {**self._head(self.object), "choices": list(choices), **more}

    def _before(self, index: int) -> str:
        if not self.echo:
            return ""
        text: str = self.vocabulary.tokenizer.decode(list(self._prompt_of(index)))
        return text

    def _logprobs(self, index: int, text: Text, *, prompt: bool = True) -> Json:
        ids, logprobs = list(text.ids), list(text.logprobs)
        tops: list[Top | None] = list(text.top) or [()] * len(ids)
        if self.echo and prompt:
            read = list(self._prompt_of(index))
            scores = text.scores or PromptScores(logprobs=(), best=())
            first: list[float | None] = [None]
            ids = read + ids
            logprobs = [*first, *scores.logprobs, *logprobs]  # type: ignore[list-item]
            tops = [None, *(scores.top or [()] * (len(read) - 1)), *tops]
        tokens = [self.vocabulary.text(id) for id in ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": [
                None if top is None else {self.vocabulary.text(id): nats for id, nats in top}
                for top in tops
            ],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions.

    Args:
        tools: calls of tools are looked for in the texts.
    """

    object, prefix = "chat.completion", "chatcmpl"

    def __init__(self, *args: Any, tools: bool, **more: Any) -> None:
        super().__init__(*args, **more)
        self._parsers = [ToolParser() if tools else None for _ in self.texts]
        self._begun = [False] * len(self.texts)

    def choice(self, index: int, text: Text) -> Json:
        """See `Answer`."""
        content: str | None = text.text
        calls: list[Json] = []
        parser = self._parsers[index]
        if parser is not None:
            content = parser.push(text.text) + parser.finish()
            calls = parser.calls
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"tool_calls": calls, "content": content or None}
        choice = {
            "index": index,
            "message": message,
            "finish_reason": "tool_calls" if calls and text.finish == "stop" else text.finish,
            "logprobs": self._logprobs(text) if self.logprobs else None,
        }
        if self.token_ids:
            choice["prompt_token_ids"] = list(self._prompt_of(index))
            choice["token_ids"] = text.ids
        return choice

    def chunks(self, index: int, event: Event) -> Iterator[Json]:
        """See `Answer`."""
        part = Text()
        part.add(event)
        self.texts[index].add(event)
        if not self._begun[index]:
            self._begun[index] = True
            yield self.chunk([_delta(index, {"role": "assistant", "content": ""})])
        shown, calls = part.text, []
        parser = self._parsers[index]
        if parser is not None:
            before = len(parser.calls)
            shown = parser.push(part.text) + (parser.finish() if part.finish else "")
            calls = [
                {"index": before + number, **call}
                for number, call in enumerate(parser.calls[before:])
            ]
            if parser.calls and part.finish == "stop":
                part.finish = "tool_calls"
        delta: Json = {"content": shown} if shown else {}
        if calls:
            delta["tool_calls"] = calls
        logprobs = self._logprobs(part) if self.logprobs and part.ids else None
        if delta or logprobs:
            choice = _delta(index, delta, logprobs=logprobs)
            if self.token_ids:
                choice["token_ids"] = part.ids
            yield self.chunk([choice])
        if part.finish:
            yield self.chunk([_delta(index, {}, finish=part.finish)])

    def chunk(self, choices: Sequence[Json], **more: Any) -> Json:
        """See `Answer`."""
        return {**self._head("chat.completion.chunk"), "choices": list(choices), **more}

    def _logprobs(self, text: Text) -> Json:
        tops = text.top or [()] * len(text.ids)
        return {
            "content": [
                {**self._token(id, nats), "top_logprobs": [self._token(*one) for one in top]}
                for id, nats, top in zip(text.ids, text.logprobs, tops, strict=True)
            ],
            "refusal": None,
        }

    def _token(self, id: int, nats: float) -> Json:
        spelt = self.vocabulary.bytes(id)
        return {"token": self.vocabulary.text(id), "logprob": nats, "bytes": spelt}


def _delta(
    index: int, delta: Json, *, finish: str | None = None, logprobs: Json | None = None
) -> Json:
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
