"""What `espalier generate` does with prompts: some, a file of them, or one as it comes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.errors import ConfigError
from runner.serve.load import speaker
from runner.serve.sampling import Sampling

_AT_ONCE = 16


class Answers:
    """A trained cell that continues prompts with the same wishes; the rest of the arguments are `Sampling`'s.

    Raises:
        ConfigError: a wish that cannot be met.
    """

    def __init__(self, folder: Path, *, average: bool = False, **wishes: Any) -> None:
        try:
            self.how = Sampling(**wishes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.speak = speaker(folder, average=average)

    def of_prompts(self, prompts: Sequence[str], n: int, slide: bool) -> Iterator[str]:
        """Yield each prompt with its continuation, `n` of them."""
        for text, done in self._batches(prompts, n, slide):
            yield text + done.text

    def of_file(self, file: Path, n: int, slide: bool) -> Iterator[str]:
        """Yield a JSON line for each prompt of a JSON-lines file and sample: prompt, text, finish, logprob."""
        prompts = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                prompts.append(str(json.loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f'{file}:{number} is not a JSON object with a "prompt"') from error  # fmt: skip
        for text, done in self._batches(prompts, n, slide):
            row = {"prompt": text, "text": done.text, "finish": done.finish, "tokens": len(done.ids), "logprob": sum(done.logprobs)}  # fmt: skip
            yield json.dumps(row, ensure_ascii=False)

    def stream(self, prompt: str, slide: bool, say: Callable[[str], None]) -> None:
        """Say the prompt and each piece of its continuation as soon as it is certain."""
        say(prompt)
        self.speak([prompt], self.how, slide=slide, on_text=lambda _, piece: say(piece))

    def _batches(self, prompts: Sequence[str], n: int, slide: bool) -> Iterator[tuple[str, Any]]:
        wanted = [(text, replace(self.how, seed=self.how.seed + i)) for text in prompts for i in range(n)]  # fmt: skip
        for first in range(0, len(wanted), _AT_ONCE):
            part = wanted[first : first + _AT_ONCE]
            done = self.speak([text for text, _ in part], [how for _, how in part], slide=slide)
            yield from zip([text for text, _ in part], done, strict=True)
