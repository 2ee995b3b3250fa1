"""A finished cell as a model to talk to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.language_model import LanguageModel
from runner.data.tokenizers import Tokenizer, loads
from runner.generate.beam import beam_search
from runner.generate.generate import Completion, generate
from runner.generate.sampling import Sampling
from runner.machine.errors import CheckpointError, ConfigError
from runner.records import checkpoint
from runner.records.cells import load_cell


def load_model(folder: Path, *, average: bool = False) -> tuple[LanguageModel, Tokenizer, int]:
    """Return (model with the newest weights, tokenizer, longest sequence it was trained at).

    `average` takes the weights averaged along training instead.

    Raises:
        CheckpointError: the run has no checkpoint yet.
    """
    cell = load_cell(folder)
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"{folder} has no checkpoint; train the cell first (state: {cell.state})"
        )
    tokenizer = loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = cell.config.model.build(tokenizer.vocab_size, cell.config.seed)
    checkpoint.load_weights(newest, model, average=average)
    context = cell.config.train.sequence_length
    if cell.config.init is not None:  # what it was trained at elsewhere counts
        context = max(context, getattr(cell.config.model, "context_length", context))
    return model, tokenizer, context


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Speaker:
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
        self.model = model.to(device, DTYPES[dtype]).for_inference(compiled=compiled)

    def speak(
        self, prompts: Sequence[str], how: Sampling | Sequence[Sampling], **more: Any
    ) -> list[Completion]:
        """Return a continuation of each prompt; further keyword arguments are those of `generate`."""
        with _explained():
            ids = [self._ids(prompt) for prompt in prompts]
            return generate(self.model, ids, how, compiled=self.compiled, **self._about(), **more)

    def likeliest(self, prompt: str, how: Sampling, beams: int) -> list[Completion]:
        """Return the continuations that beam search finds, the best first."""
        with _explained():
            return beam_search(
                self.model, self._ids(prompt), beams=beams, max_new_tokens=how.max_new_tokens,
                stop=how.stop, **self._about(),
            )  # fmt: skip

    def _ids(self, text: str) -> Tensor:
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
