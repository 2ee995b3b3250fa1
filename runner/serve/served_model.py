"""A run as the server has it: its model, its names, its prompts."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from models.prefix_cache import PrefixCache
from runner.data.chat_template import ChatTemplate, Message, chat_ids, template_of
from runner.data.corpus import (
    control_texts,
    encode_literally,
    encode_with_special,
    end_ids,
    prompt_ids,
)
from runner.generate.canvas_row import around
from runner.generate.denoising import Denoising
from runner.generate.engine import Engine
from runner.generate.generate import make_engine
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError, DataError
from runner.records.cells import load_cell
from runner.serve.errors import ApiError, invalid
from runner.serve.pace import TIMED_TOKENS, Pace, measured_pace
from runner.serve.vocabulary import Vocabulary

T = TypeVar("T")
_LARGEST_CHUNK = 512
_ADAPTER_NAME = re.compile(r"[\w./:@+-]{1,128}", re.ASCII)
_INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


class ServedModel:
    """See the file.

    Attributes:
        name: of the run; `aliases` are further names by which clients ask for it.
        created: when it was trained, seconds since 1970.
        template: None for a model of texts, which holds no conversations.
        infill: the special tokens before, behind and in the place of what is missing, None for a
            model that fills in nothing.
    """

    def __init__(self, folder: Path, generator: TextGenerator) -> None:
        cell = load_cell(folder)
        self.generator, self.tokenizer = generator, generator.tokenizer
        self.context = generator.context
        self.name, self.aliases = cell.config.name, (cell.fingerprint,)
        _check_adapter_names(self.names[1:], (self.name, *self.aliases))
        self.created = int((folder / "checkpoints").stat().st_mtime)
        has_template = template_of(self.tokenizer) is not None
        self.template = ChatTemplate(self.tokenizer) if has_template else None
        controls = set(control_texts(self.tokenizer))
        known = [names for names in _INFILL if controls >= set(names)]
        self.infill = known[0] if known else None
        self.vocabulary = Vocabulary(self.tokenizer, end_ids(self.tokenizer))

    @property
    def uses_tools(self) -> bool:
        """Whether it was trained to call tools: its template has a place for them."""
        return self.template is not None and self.template.knows_tools

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, and those of its adapters."""
        adapters = self.generator.adapters
        return (self.name, *(() if adapters is None else adapters.names))

    def adapter_of(self, name: str | None) -> str | None:
        """Return the adapter that a client asks for by a model's name, None for none."""
        return name if name in self.names[1:] else None

    def check_name(self, name: str | None) -> None:
        """Raise ApiError if a client asks for another model; None is this one."""
        if name is not None and name not in (*self.names, *self.aliases):
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; ask for {self.name!r}, or GET /v1/models",
                code="model_not_found",
                param="model",
            )

    def engine(
        self,
        *,
        rows: int,
        chunk: int,
        invariant: bool = False,
        prefixes: PrefixCache | None = None,
    ) -> Engine[Any]:
        """Return an engine of the model; it is the only one of a model with its own strategy.

        Args:
            rows, chunk, invariant: see `runner.generate.generate.make_engine`.
            prefixes: keeps what is read of prompts (None: nothing is kept).
        """
        made = self.generator
        own = {"strategy": made.strategy, "draft": made.draft, "adapters": made.adapters}
        return self._engine(rows, invariant, prefixes=prefixes, chunk=chunk, **own)

    def pace(self, *, rows: int, invariant: bool = False) -> Pace:
        """Measure how many tokens of a prompt a step of others may read."""
        most = max(1, min(_LARGEST_CHUNK, self.context // 2))
        if self.generator.strategy is not None or self.context <= TIMED_TOKENS:
            return Pace({0: most})  # the strategy of a model reads nothing beforehand
        engine = self._engine(rows, invariant, chunk=most)
        on_cpu = next(self.generator.model.parameters()).device.type == "cpu"
        # What else the machine does takes no time of this thread.
        clock = time.thread_time if on_cpu else time.perf_counter
        return measured_pace(engine, self.vocabulary.size, most, clock)

    def _engine(self, rows: int, invariant: bool, **more: Any) -> Engine[Any]:
        return make_engine(
            self.generator.model,
            context=self.context,
            decode=self.tokenizer.decode,
            ends=end_ids(self.tokenizer),
            rows=rows,
            compiled=self.generator.compiled,
            invariant=invariant,
            overflow="refuse",
            bidirectional=self.generator.bidirectional,
            **more,
        )

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue, and of an empty one what begins a document.

        Raises:
            ApiError: the tokenizer does not know the text.
        """
        return self._encoded(lambda: prompt_ids(self.tokenizer, text), "prompt")

    def plain_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text, as they are or with the special tokens around them."""

        def encode() -> list[int]:
            given = (
                encode_with_special(self.tokenizer, text)
                if add_special_tokens
                else self.tokenizer.encode(text)
            )
            return [int(index) for index in given]

        return self._encoded(encode, "prompt")

    def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins.

        Raises:
            ApiError: the model has no chat template, or it refuses the conversation.
        """
        template = self.template
        if template is None:
            raise invalid(
                f"{self.name} has no chat template: it was trained on texts, not conversations; "
                "use /v1/completions, or a run whose tokenizer has a template",
                "messages",
                "no_chat_template",
            )
        return self._encoded(
            lambda: chat_ids(
                template,
                self.tokenizer,
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            ),
            "messages",
        )

    def around(self, before: str, behind: str) -> tuple[list[int], tuple[int, ...]]:
        """Return (ids of the prompt, ids behind the canvas) of a text with a gap.

        A model of next tokens has no canvas: its prompt holds both.

        Raises:
            ApiError: see `infill_ids`.
        """
        if self.generator.settings is not Denoising:
            return self.infill_ids(before, behind), ()
        prompt, suffix = self._encoded(
            lambda: around(self.tokenizer, before, behind), "input_prefix"
        )
        return prompt, tuple(suffix)

    def infill_ids(self, before: str, behind: str) -> list[int]:
        """Return the ids of a text with a gap, up to where the missing part begins.

        Raises:
            ApiError: the model fills in nothing.
        """
        if self.infill is None:
            raise invalid(
                f"{self.name} fills in nothing: its tokenizer has no tokens for it, such as "
                f"{', '.join(_INFILL[0])}; leave the suffix out",
                "suffix",
                "unsupported_parameter",
            )
        prefix, suffix, middle = self.infill
        return self._encoded(
            lambda: [
                *(int(i) for i in self.tokenizer.encode(prefix)),
                *self._literal(before),
                *(int(i) for i in self.tokenizer.encode(suffix)),
                *self._literal(behind),
                *(int(i) for i in self.tokenizer.encode(middle)),
            ],
            "input_prefix",
        )

    def _literal(self, text: str) -> list[int]:
        return [int(index) for index in encode_literally(self.tokenizer, text)]

    def _encoded(self, encode: Callable[[], T], param: str) -> T:
        try:
            return encode()
        except (DataError, UnicodeError) as error:
            raise invalid(str(error), param) from None


def _check_adapter_names(names: Sequence[str], taken: Sequence[str]) -> None:
    for name in names:
        if name in taken:
            raise ConfigError(f"--adapter {name} has the name of the model; give another: NAME=RUN")
        if not _ADAPTER_NAME.fullmatch(name):
            raise ConfigError(
                f"--adapter {name!r}: clients name an adapter by 1 to 128 letters, digits and "
                "characters of . _ / : @ + -; give another: NAME=RUN"
            )
