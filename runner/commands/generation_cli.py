"""What `espalier generate` does with prompts: some, a file of them, one as it comes, or a talk."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.generate.generate import Completion
from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError

_AT_ONCE = 16


class Answers:
    """A trained cell that continues prompts with the same wishes; the rest of the arguments are `Sampling`'s.

    Args:
        n: continuations of each prompt; beams: above 1: the `n` best of so many, instead of drawn ones.

    Raises:
        ConfigError: a wish that cannot be met.
    """

    def __init__(
        self,
        folder: Path,
        *,
        average: bool = False,
        dtype: str = "fp32",
        compiled: bool = False,
        n: int = 1,
        beams: int = 1,
        slide: bool = False,
        **wishes: Any,
    ) -> None:
        if n < 1 or (beams > 1 and n > beams):
            raise ConfigError(
                f"n={n} must be at least 1, and at most beams={beams} where there are several"
            )
        try:
            self.how = Sampling(**wishes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.n, self.beams, self.slide = n, beams, slide
        self.generator = TextGenerator(folder, average=average, dtype=dtype, compiled=compiled)

    def of_prompts(self, prompts: Sequence[str]) -> Iterator[tuple[str, Completion]]:
        """Yield each prompt with its continuations."""
        if self.beams > 1:
            for prompt in prompts:
                for done in self.generator.beam_search(prompt, self.how, self.beams)[: self.n]:
                    yield prompt, done
            return
        wanted = [
            (text, replace(self.how, seed=self.how.seed + i))
            for text in prompts
            for i in range(self.n)
        ]
        for first in range(0, len(wanted), _AT_ONCE):
            part = wanted[first : first + _AT_ONCE]
            done_ones = self.generator.generate(
                [text for text, _ in part], [how for _, how in part], slide=self.slide
            )
            yield from zip([text for text, _ in part], done_ones, strict=True)

    def stream(self, prompt: str, say: Callable[[str], None]) -> None:
        """Say the prompt and each piece of its continuation as soon as it is certain."""
        say(prompt)
        self.generator.generate(
            [prompt], self.how, slide=self.slide, on_text=lambda _, piece: say(piece)
        )

    def talk(self, lines: Iterable[str], say: Callable[[str], None]) -> None:
        """Continue one line after the other, each for itself; a line that cannot be is told why."""
        for line in lines:
            try:
                self.stream(line.rstrip("\n"), say)
            except ConfigError as error:
                say(f"error: {error}")
            say("\n")


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a JSON-lines file.

    Raises:
        ConfigError: a line is no JSON object with a prompt; it is named.
    """
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{file}:{number} is not a JSON object with a "prompt"') from error
    return prompts


def as_json(prompt: str, done: Completion, *, logprobs: bool) -> str:
    """Return a continuation as a line of JSON; with `logprobs` each id and its log-probability too."""
    row = {
        "prompt": prompt,
        "text": done.text,
        "finish": done.finish,
        "tokens": len(done.ids),
        "logprob": sum(done.logprobs),
    }
    if logprobs:
        row |= {"ids": done.ids, "logprobs": done.logprobs}
    return json.dumps(row, ensure_ascii=False)
