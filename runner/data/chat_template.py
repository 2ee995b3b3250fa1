"""The chat template of a tokenizer: messages to text, by Jinja2 in its sandbox.

A message is {"role": ..., "content": ...}. A template sees what transformers gives it: `messages`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`, `tojson`,
and `{% generation %}`, which marks nothing here.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
            self._template = _compiled(text)
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template is no Jinja2: {error}") from None
        config = _files(tokenizer).get(_CONFIG, {})
        self.tokens = {name: _content(config.get(name)) for name in _TOKENS if config.get(name)}
        self.tokens.setdefault("eos_token", getattr(tokenizer, "eos_token", ""))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, where: str = ""
    ) -> str:
        """Return the text of a conversation.

        Args:
            add_generation_prompt: end with what precedes an answer.
            where: the place of the conversation, for messages of errors.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        try:
            text: str = self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except (TemplateError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"{where or 'the conversation'}: the tokenizer's chat template fails on the roles "
                f"{roles} ({error}); mend the conversation or the template"
            ) from None
        return text


def _files(tokenizer: Any) -> Mapping[str, Any]:
    return getattr(getattr(tokenizer, "beside", None), "files", {})


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


@lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


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
