"""A finished cell as a model to talk to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.contract import for_inference
from runner.generate.beam import beam_search
from runner.generate.generate import Completion, generate
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError
from runner.records.trained_model import load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TextGenerator:
    """The model of a run folder, asked in text, its weights in `dtype`: fp32, bf16 or fp16; `compiled`: by a compiled step.

    ConfigError is raised for what it cannot be asked.
    """

    def __init__(
        self, folder: Path, *, average: bool = False, dtype: str = "fp32", compiled: bool = False
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is none of: {', '.join(DTYPES)}")
        model, self.tokenizer, self.context = load_model(folder, average=average)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.compiled = compiled
        self.model = for_inference(model.to(device, DTYPES[dtype]), compiled=compiled)

    def generate(
        self, prompts: Sequence[str | None], how: Sampling | Sequence[Sampling], **more: Any
    ) -> list[Completion]:
        """Return a continuation of each prompt (None: the beginning of a document).

        Further keyword arguments are those of `generate`.
        """
        with _explained():
            ids = [self._ids(prompt) for prompt in prompts]
            return generate(self.model, ids, how, compiled=self.compiled, **self._about(), **more)

    def beam_search(self, prompt: str, how: Sampling, beams: int) -> list[Completion]:
        """Return the continuations that beam search finds, the best first."""
        with _explained():
            return beam_search(
                self.model,
                self._ids(prompt),
                beams=beams,
                max_new_tokens=how.max_new_tokens,
                stop=how.stop,
                **self._about(),
            )

    def _ids(self, text: str | None) -> Tensor:
        if text is None:
            return torch.tensor([self.tokenizer.eos])
        return torch.from_numpy(self.tokenizer.encode(text).astype("int64"))

    def _about(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        return {"context": self.context, "decode": tokenizer.decode, "eos": tokenizer.eos}


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
