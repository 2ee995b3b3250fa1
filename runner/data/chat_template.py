"""The chat template of a tokenizer: messages to text, by Jinja2 in its sandbox.

A message is {"role": ..., "content": ...}. A template sees what transformers gives it: `messages`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`, `tojson`,
and `{% generation %}`, which marks nothing here.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runner.data.corpus import control_texts, encode_literally, encode_with_special
from runner.machine.errors import ConfigError, DataError

Message = Mapping[str, Any]
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def template_of(tokenizer: Any) -> str | None:
    """Return the text of a tokenizer's chat template, None if it has none.

    Of several, which are named, it is that named "default".
    """
    files = _files(tokenizer)
    given = files.get(_FILE) or files.get(_CONFIG, {}).get("chat_template")
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}.get("default")
    return given or None


class ChatTemplate:
    """The template of a tokenizer.

    Raises:
        ConfigError: the tokenizer has no template, or it is no Jinja2.
    """

    def __init__(self, tokenizer: Any) -> None:
        text = template_of(tokenizer)
        if text is None:
            raise ConfigError(
                f"the tokenizer ({type(tokenizer).__name__}) has no chat template; take the one of "
                "a model that was trained for conversations: tokenizer=folder tokenizer.path=DIR"
            )
        try:
            self._template, self._names = _compiled(text)
        except Exception as error:  # constants are computed here: a template's own mistakes
            raise ConfigError(
                f"the tokenizer's chat template is no Jinja2: {_described(error)}"
            ) from None
        config = _files(tokenizer).get(_CONFIG, {})
        self.tokens = {name: _content(config.get(name)) for name in _TOKENS if config.get(name)}
        self.tokens.setdefault("eos_token", getattr(tokenizer, "eos_token", ""))

    @property
    def knows_tools(self) -> bool:
        """Whether it has a place for `tools`, as that of a model which was trained to call them."""
        return "tools" in self._names

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        where: str = "",
        tools: Sequence[Message] | None = None,
    ) -> str:
        """Return the text of a conversation.

        Args:
            add_generation_prompt: end with what precedes an answer.
            tools: what the model may call, as OpenAI describes them.
            where: the place of the conversation, for messages of errors.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        try:
            text: str = self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **({} if tools is None else {"tools": list(tools)}),
                **self.tokens,
            )
        except Exception as error:  # it is a program, and somebody else's
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"{where or 'the conversation'}: the tokenizer's chat template fails on the roles "
                f"{roles} ({_described(error)}); mend the conversation or the template"
            ) from None
        return text


class Literals:
    """Keeps what messages say of special tokens from becoming them.

    A template's own `<|im_end|>` is a token; that of a message is hidden behind a mark while the
    template is rendered, and spelt letter by letter.
    """

    def __init__(self, tokenizer: Any) -> None:
        texts = sorted(control_texts(tokenizer), key=len, reverse=True)
        secret = secrets.token_hex(8)
        self._marks = {text: f"\ue000{secret}{n}\ue001" for n, text in enumerate(texts)}
        self._texts = {mark: text for text, mark in self._marks.items()}
        self._controls = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._any_mark = re.compile(f"(\ue000{secret}\\d+\ue001)")

    def hide(self, given: Any) -> Any:
        """Return messages, or any value in them, with marks."""
        if self._controls is None:
            return given
        if isinstance(given, str):
            return self._controls.sub(lambda match: self._marks[match[0]], given)
        if isinstance(given, Mapping):
            return {key: self.hide(value) for key, value in given.items()}
        return [self.hide(value) for value in given] if isinstance(given, list | tuple) else given

    def are_in(self, text: str) -> bool:
        """Return whether a rendered text has a mark."""
        return self._any_mark.search(text) is not None

    def ids(self, tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a rendered text, what is hidden in it spelt.

        Args:
            special: with the tokens that the tokenizer puts around a text, at its beginning.
        """
        ids: list[int] = []
        for number, piece in enumerate(self._any_mark.split(text)):
            if piece in self._texts:
                own = encode_literally(tokenizer, self._texts[piece])
            elif special and number == 0:
                own = encode_with_special(tokenizer, piece)
            else:
                own = tokenizer.encode(piece)
            ids += [int(index) for index in own]
        return ids


def chat_ids(
    template: ChatTemplate,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the ids of a conversation; no text of a message becomes a special token.

    Raises:
        DataError: the template refuses the conversation, or fails on it.
    """
    literals = Literals(tokenizer)
    text = template.render(
        [literals.hide(dict(message)) for message in messages],
        tools=None if tools is None else [literals.hide(dict(tool)) for tool in tools],
        add_generation_prompt=add_generation_prompt,
    )
    return literals.ids(tokenizer, text, special=True)


def _files(tokenizer: Any) -> Mapping[str, Any]:
    return getattr(getattr(tokenizer, "beside", None), "files", {})


def _described(error: Exception) -> str:
    """Return the error as text: a template's own words alone, the kind with others."""
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


@lru_cache(maxsize=8)
def _compiled(text: str) -> tuple[Any, set[str]]:
    """Return the template and the names that it takes from outside."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text), find_undeclared_variables(environment.parse(text))


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON without the HTML escapes of Jinja2's own filter, as transformers does."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """Reads `{% generation %}...{% endgeneration %}` as what is between."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
