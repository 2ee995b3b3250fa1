"""A finished cell as a model to talk to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from models.language_model import LanguageModel
from runner import checkpoint
from runner.data.tokenizers import Tokenizer, loads
from runner.errors import CheckpointError, ConfigError
from runner.serve.generate import Completion, generate
from runner.serve.sampling import Sampling
from runner.sweep.cells import load_cell


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


def speaker(folder: Path, *, average: bool = False) -> Callable[..., list[Completion]]:
    """Return a function of (prompts as text, Sampling) that continues them with the model in `folder`.

    Further keyword arguments are those of `generate`. ConfigError is raised for a prompt that cannot be read.
    """
    model, tokenizer, context = load_model(folder, average=average)

    def speak(prompts: Sequence[str], how: Sampling | Sequence[Sampling], **more: Any) -> list[Completion]:  # fmt: skip
        ids = [torch.from_numpy(tokenizer.encode(prompt).astype("int64")) for prompt in prompts]
        try:
            return generate(
                model, ids, how, context=context, decode=tokenizer.decode, eos=tokenizer.eos, **more
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    return speak
