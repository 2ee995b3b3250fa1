"""From the fields of a request to requests of the engine."""

import json
import secrets
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from runner.generate.engine import Engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.serve.errors import ApiError, invalid
from runner.serve.fields import (
    MAX_SEQUENCES,
    ChatBody,
    CompletionBody,
    Generation,
    InfillBody,
    TokenizeBody,
)
from runner.serve.served_model import ServedModel
from runner.serve.vocabulary import (
    Grammar,
    choice_grammar,
    json_grammar,
    regex_grammar,
)

_COMPLETION_TOKENS = 16  # OpenAI's default
_COLDEST = 1e-5  # below it a temperature is greedy
_SAME_NAME = (
    "algorithm",
    "block",
    "frequency_penalty",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
    "steps",
    "threshold",
    "top_p",
)


@dataclass(frozen=True)
class Plan:
    """What a request asks of the engine.

    Args:
        prompts: ids of each prompt.
        n: continuations of each; the requests of one prompt stand side by side.
    """

    requests: Sequence[Request]
    prompts: Sequence[Sequence[int]]
    n: int

    @property
    def tokens(self) -> int:
        """The tokens of all prompts and the most new ones, for limits."""
        new = sum(request.how.max_new_tokens for request in self.requests)
        return new + sum(len(prompt) for prompt in self.prompts)


class Planner:
    """Turns bodies into requests that the engine can run.

    Every method raises ApiError for what it can not.
    """

    def __init__(self, model: ServedModel, engine: Engine[Any]) -> None:
        self.model, self.engine = model, engine
        self._known = {field.name for field in fields(model.generator.settings)}

    def completion(self, body: CompletionBody, salt: str) -> Plan:
        """Return the plan of a completion."""
        if body.best_of not in (None, body.n or 1):
            raise invalid(
                f"best_of={body.best_of} must be n={body.n or 1}: all that is generated is "
                "returned; raise n and choose",
                "best_of",
                "unsupported_parameter",
            )
        if body.suffix is not None and body.echo:
            raise invalid("echo does not go with suffix; leave one out", "echo")
        given = body.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        texts: Sequence[Any] = given if several else [given]  # type: ignore[assignment]
        pairs = [self._prompt(text, body.suffix) for text in texts]
        scores = body.echo and body.logprobs is not None
        return self._plan(
            body,
            [prompt for prompt, _ in pairs],
            salt=salt,
            new=body.max_tokens,
            default=_COMPLETION_TOKENS,
            top=body.logprobs,
            score_from=1 if scores else None,
            suffix=pairs[0][1],
        )

    def chat(self, body: ChatBody, salt: str) -> Plan:
        """Return the plan of an answer in a conversation."""
        if body.tools and not self.model.uses_tools:
            raise invalid(
                f"{self.model.name} was not trained to call tools: its chat template has no place "
                "for them; leave tools out",
                "tools",
                "unsupported_parameter",
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs does nothing without logprobs=true; add it", "top_logprobs")
        tools = None
        if body.tools and body.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        ids = self.model.chat_ids(messages_of(body.messages), tools)
        new = body.max_completion_tokens
        return self._plan(
            body,
            [ids],
            salt=salt,
            new=body.max_tokens if new is None else new,
            default=None,
            top=body.top_logprobs if body.logprobs else None,
        )

    def infill(self, body: InfillBody, salt: str) -> Plan:
        """Return the plan of a missing part."""
        ids, suffix = self.model.around(body.input_prefix, body.input_suffix)
        same = body.model_dump(exclude={"input_prefix", "input_suffix", "n_predict"})
        generation = Generation(**same)
        new, default = body.n_predict, _COMPLETION_TOKENS if suffix else None
        return self._plan(
            generation, [ids], salt=salt, new=new, default=default, top=None, suffix=suffix
        )

    def tokens(self, body: TokenizeBody) -> tuple[list[int], list[str] | None]:
        """Return the ids of a prompt or a conversation, and the text of each if asked for."""
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if body.messages is not None:
            said = messages_of(body.messages)
            ids = self.model.chat_ids(said, add_generation_prompt=body.add_generation_prompt)
        else:
            assert body.prompt is not None
            ids = self.model.plain_ids(body.prompt, add_special_tokens=body.add_special_tokens)
        text = self.model.vocabulary.text
        return ids, [text(id) for id in ids] if body.return_token_strs else None

    def _prompt(self, given: Any, suffix: str | None) -> tuple[list[int], tuple[int, ...]]:
        """Return the ids of a prompt, and those behind a canvas."""
        if suffix is None:
            return self.model.text_ids(given) if isinstance(given, str) else list(given), ()
        if not isinstance(given, str):
            raise invalid("suffix needs a prompt that is text; give one", "prompt")
        return self.model.around(given, suffix)

    def _plan(
        self,
        body: Generation,
        prompts: Sequence[list[int]],
        *,
        salt: str,
        new: int | None,
        default: int | None,
        top: int | None,
        score_from: int | None = None,
        suffix: tuple[int, ...] = (),
    ) -> Plan:
        n = body.n or 1
        if n * len(prompts) > MAX_SEQUENCES:
            raise invalid(
                f"n={n} of {len(prompts)} prompts are {n * len(prompts)} texts, more than "
                f"{MAX_SEQUENCES}; ask for fewer at a time",
                "n",
            )
        grammar = self._grammar(body)
        settings = self._settings(body, top)
        requests = []
        for prompt in prompts:
            most = self._most([*prompt, *suffix], new, default)
            own: dict[str, Any] = {"max_new_tokens": most}
            if suffix:
                room = self.engine.strategy.context - len(prompt) - len(suffix)
                own |= {"suffix": suffix, "max_canvas": max(most, min(room, 4 * most))}
            how = self._how({**settings, **own})
            for number in range(n):  # as n requests whose seeds follow each other
                request = Request(
                    id=uuid.uuid4().hex,
                    prompt=prompt,
                    how=replace(how, seed=(how.seed + number) % (1 << 63)),
                    score_from=score_from if len(prompt) > 1 else None,
                    constraint=grammar.copy() if grammar is not None else None,
                    salt=salt,
                    adapter=self.model.adapter_of(body.model),
                )
                self._check(request)
                requests.append(request)
        return Plan(requests, prompts, n)

    def _most(self, prompt: Sequence[int], new: int | None, default: int | None) -> int:
        """Return the most tokens to add to a prompt.

        Raises:
            ApiError: they pass the context.
        """
        room = self.engine.strategy.context - len(prompt)
        if new is None and room > 0:
            return room if default is None else min(default, room)
        wanted = 1 if new is None else new
        if wanted > room:
            raise invalid(
                f"this model reads {self.engine.strategy.context} tokens at most; the prompt has "
                f"{len(prompt)} and {wanted} more are asked for: shorten it, or ask for fewer",
                "messages" if default is None else "prompt",
                "context_length_exceeded",
            )
        return wanted

    def _settings(self, body: Generation, top: int | None) -> dict[str, Any]:
        """Return those settings of a request that are given.

        Raises:
            ApiError: this model has no such setting.
        """
        values = {name: getattr(body, name) for name in _SAME_NAME}
        given = {name: value for name, value in values.items() if value is not None}
        if body.temperature is not None:
            given["temperature"] = body.temperature if body.temperature >= _COLDEST else 0.0
        seed = body.seed if body.seed is not None else secrets.randbits(63)
        given["seed"] = seed % (1 << 63)
        if body.top_k is not None and body.top_k > 0:
            given["top_k"] = body.top_k
        if body.stop is not None:
            given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        if body.logit_bias:
            bias = {int(id): value for id, value in body.logit_bias.items()}
            given["logit_bias"] = tuple(bias.items())
        if body.ignore_eos:
            given["ends"] = ()
        if top is not None:
            given["top_logprobs"] = top
        unknown = sorted(given.keys() - self._known)
        if unknown:
            field = "logprobs" if unknown[0] == "top_logprobs" else unknown[0]
            raise invalid(
                f"{field} means nothing to {self.model.name}, which generates in another way "
                f"(it knows {', '.join(sorted(self._known))}); leave it out",
                field,
                "unsupported_parameter",
            )
        return given

    def _how(self, given: dict[str, Any]) -> Any:
        try:
            how = self.model.generator.settings(**given)
            if isinstance(how, Sampling):
                how.check_vocabulary(self.model.generator.model.vocab_size)
        except ValueError as error:
            param = str(error).partition("=")[0].partition(" ")[0]
            param = {"max_new_tokens": "max_tokens"}.get(param, param)
            raise invalid(str(error), param if param in given else None) from None
        return how

    def _check(self, request: Request) -> None:
        try:
            self.engine.check(request)
        except ValueError as error:
            raise invalid(str(error), "prompt") from None

    def _grammar(self, body: Generation) -> Grammar | None:
        param = "structured_outputs" if body.structured_outputs else "response_format"
        try:
            source = _source(body)
            return self.model.vocabulary.grammar(source) if source is not None else None
        except ApiError:
            raise
        except ValueError as error:
            raise invalid(f"{param} is no grammar: {error}", param) from None


def _source(body: Generation) -> str | None:
    """Return the grammar that a request asks for."""
    form, structured = body.response_format, body.structured_outputs
    if structured is not None:
        given = structured.model_dump(exclude_none=True, by_alias=True)
        if len(given) != 1 or (form is not None and form.type != "text"):
            raise invalid(
                "give exactly one of json, regex and choice, and no response_format beside it",
                "structured_outputs",
            )
        if structured.regex is not None:
            return regex_grammar(structured.regex)
        if structured.choice is not None:
            return choice_grammar(structured.choice)
        return json_grammar(given["json"])
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_grammar({"type": "object"})
    if form.type == "regex" and form.pattern is not None:
        return regex_grammar(form.pattern)
    if form.type == "json_schema" and form.json_schema is not None:
        return json_grammar(form.json_schema.schema_)
    missing = "pattern" if form.type == "regex" else "json_schema"
    raise invalid(f"response_format of type {form.type} needs {missing}; add it", "response_format")


def messages_of(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages as a chat template takes them.

    The content is one text; arguments of calls, which OpenAI writes as JSON, are what it says.
    """
    plain = []
    for message in messages:
        given = message.model_dump(exclude_none=True, exclude={"refusal"})
        content = given.get("content", "")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        for call in given.get("tool_calls", ()):
            with suppress(ValueError):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        role = "system" if message.role == "developer" else message.role
        plain.append({**given, "role": role, "content": content})
    return plain
