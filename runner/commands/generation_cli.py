"""Prompts and output of `espalier generate`: lists, files, streaming and the interactive mode."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from runner.commands.tools import named_tools
from runner.data.dialogue_format import dialogue_format
from runner.generate.denoising import Denoising
from runner.generate.generate import Completion, Settings
from runner.generate.sampling import Sampling
from runner.generate.text_generator import Prompt, TextGenerator
from runner.generate.tools import Tools
from runner.machine.errors import ConfigError, DataError
from runner.machine.text_files import as_text, json_lines
from runner.records.cells import load_cell

_ROWS = 16  # continued at a time
_TOKENS = 200  # added to a prompt by default


class PromptCompleter:
    """Continues prompts by a trained cell, all with the same sampling parameters.

    Args:
        n: continuations of each prompt.
        beams: above 1: beam search with this many beams, of which the `n` best are returned.
        chat: a prompt is what a user says, and is put into the tokenizer's chat template or
            between its marks.
        system: with `chat`, the message before it.
        tools: names of what the model may call, with commas between them; see `named_tools`.
        slide: truncate a prompt longer than the context to its last tokens.
        **settings: those of `Sampling`, or of `Denoising` where the model fills in a canvas; None
            is the default.

    Raises:
        ConfigError: a value is out of range, or does nothing with this model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        average: bool = False,
        dtype: str = "fp32",
        precision: str = "weights",
        compiled: bool = False,
        kv_cache: str | None = None,
        draft: str | None = None,
        n: int = 1,
        beams: int = 1,
        chat: bool = False,
        system: str | None = None,
        tools: str | None = None,
        slide: bool = False,
        **settings: Any,
    ) -> None:
        if n < 1 or (beams > 1 and n > beams):
            raise ConfigError(
                f"n={n} must be at least 1, and at most beams={beams} where there are several"
            )
        self.n, self.beams, self.slide = n, beams, slide
        self.generator = TextGenerator(
            folder,
            average=average,
            dtype=dtype,
            precision=precision,
            compiled=compiled,
            kv_cache=kv_cache,
            draft=draft,
        )
        given = {name: value for name, value in settings.items() if value is not None}
        self.sampling = settings_of(self.generator, given)
        if beams > 1 and not isinstance(self.sampling, Sampling):
            raise ConfigError(f"--beams {beams}: a canvas has no beams; leave the option out")
        self.form = dialogue_format(self.generator.tokenizer) if chat else None
        self.tools = None
        if tools is not None:
            self.tools = self._named(folder, tools)
        self.before = [{"role": "system", "content": system}] if system is not None else []

    def shown(self, prompt: str) -> str:
        """Return what stands before a continuation: the prompt, nothing before an answer."""
        return "" if self.form else prompt

    def text(self, completion: Completion) -> str:
        """Return the text of a continuation, with a line for each call and each answer."""
        if not completion.num_calls:
            return completion.text
        decode, parts = (
            self.generator.tokenizer.decode,
            groupby(zip(completion.ids, completion.forced, strict=True), key=lambda pair: pair[1]),
        )
        return "\n".join(decode([index for index, _ in part]).strip("\n") for _, part in parts)

    def _named(self, folder: Path, tools: str) -> Tools:
        if self.beams > 1 or not isinstance(self.sampling, Sampling):
            raise ConfigError(
                f"--tools {tools}: neither beams nor a canvas call a tool; leave one out"
            )
        return named_tools(tools, load_cell(folder).config, self.generator.tokenizer)

    def _prompt(self, prompt: str) -> Prompt:
        """Return what is continued."""
        if self.form is None:
            return prompt
        return self.form.prompt([*self.before, {"role": "user", "content": prompt}])

    def complete(self, prompts: Sequence[str]) -> Iterator[tuple[str, Completion]]:
        """Yield (prompt, completion), `n` times for each prompt."""
        if self.beams > 1:
            assert isinstance(self.sampling, Sampling)
            for prompt in prompts:
                best = self.generator.beam_search(self._prompt(prompt), self.sampling, self.beams)
                yield from ((prompt, completion) for completion in best[: self.n])
            return
        each = [replace(self.sampling, sample=index) for index in range(self.n)]
        asked = [prompt for prompt in prompts for _ in each]
        done = self.generator.complete(
            [self._prompt(prompt) for prompt in asked],
            each * len(prompts),
            rows=min(_ROWS, len(asked)),
            slide=self.slide,
            tools=self.tools,
        )
        yield from zip(asked, done, strict=True)

    def stream(self, prompt: str, write: Callable[[str], None]) -> Completion:
        """Write the prompt, then each piece of its continuation once it can no longer change."""
        write(self.shown(prompt))
        (done,) = self.generator.generate(
            [self._prompt(prompt)],
            self.sampling,
            slide=self.slide,
            tools=self.tools,
            on_text=lambda _, piece: write(piece),
        )
        return done

    def complete_lines(self, lines: Iterable[str], write: Callable[[str], None]) -> None:
        """Write a continuation of each line, independently; of a refused line, the reason."""
        for line in lines:
            try:
                self.stream(as_text(line.rstrip("\n"), "this line"), write)
            except (ConfigError, DataError) as error:
                write(f"error: {error}")
            write("\n")


def settings_of(generator: TextGenerator, given: Mapping[str, Any]) -> Settings:
    """Return the settings that are given, of the kind that a model takes.

    Raises:
        ConfigError: a value is out of range, or this model has no such setting.
    """
    kind, most = generator.settings, _TOKENS
    if kind is Denoising:  # a canvas does not slide
        most = min(most, max(1, generator.context // 2))
    known = {field.name for field in fields(kind)}
    unknown = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if unknown:
        way = "fills in a masked canvas" if kind is Denoising else "adds one token after the other"
        raise ConfigError(f"{', '.join(unknown)} does nothing: this model {way}; leave it out")
    try:
        return kind(**{"max_new_tokens": most, **given})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def filling_in(generator: TextGenerator) -> None:
    """Check that a model fills in a canvas.

    Raises:
        ConfigError: it adds one token after the other.
    """
    if generator.settings is not Denoising:
        raise ConfigError(
            "this model adds one token after the other; a model that fills in a canvas is trained "
            "by task=diffusion or task=diffusion_infill with model.causal=false"
        )


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a JSON-lines file, plain or .gz; blank lines are left out.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object whose "prompt" is text;
            the message gives its number.
    """
    prompts = []
    for where, row in json_lines(file):
        if not isinstance(row, dict) or "prompt" not in row:
            raise DataError(f'{where} is not a JSON object with a "prompt"; mend or remove it')
        prompts.append(as_text(row["prompt"], where))
    return prompts


def passes_in_words(passes: int, tokens: int) -> str:
    """Return how many forward passes canvases took, and for each token."""
    each = f", {passes / tokens:.2f} a token" if tokens else ""
    return f"{passes} forward passes for {tokens} tokens{each}"


def as_json(prompt: str, completion: Completion, *, logprobs: bool) -> str:
    """Return a completion as a line of JSON, with `logprobs` also its ids and log-probabilities.

    `passes` counts the forward passes that filled in a canvas; `near_ties` counts choices that the
    company in a batch may have decided, if there are any.
    """
    row = {
        "prompt": prompt,
        "text": completion.text,
        "finish": completion.finish,
        "tokens": len(completion.ids),
        "logprob": sum(completion.logprobs),
    }
    if completion.num_calls:
        row |= {"calls": completion.num_calls, "forced": sum(completion.forced)}
    if completion.num_passes:
        row["passes"] = completion.num_passes
    if completion.near_ties:
        row["near_ties"] = completion.near_ties
    if logprobs:
        row |= {"ids": completion.ids, "logprobs": completion.logprobs}
    return json.dumps(row, ensure_ascii=False)
