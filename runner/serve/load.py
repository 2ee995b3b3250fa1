"""A finished cell as a model to talk to."""

from pathlib import Path

import torch

from models.language_model import LanguageModel
from runner import checkpoint
from runner.data.tokenizers import Tokenizer, loads
from runner.errors import CheckpointError, ConfigError
from runner.serve.generate import generate
from runner.sweep.cells import load_cell


def load_model(folder: Path, *, average: bool = False) -> tuple[LanguageModel, Tokenizer, int]:
    """Return (model with the newest weights, tokenizer, sequence length it was trained at).

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
    return model, tokenizer, cell.config.train.sequence_length


def continue_text(
    folder: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    average: bool = False,
) -> str:
    """Return `prompt` and its continuation by the model in `folder`."""
    model, tokenizer, context = load_model(folder, average=average)
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    if not ids.numel():
        raise ConfigError("the prompt is empty; give --prompt at least one character")
    generator = torch.Generator().manual_seed(seed)
    out = generate(
        model, ids, max_new_tokens=tokens, context=context, generator=generator,
        temperature=temperature, top_k=top_k, stop=tokenizer.eos,
    )  # fmt: skip
    return tokenizer.decode(out.tolist())
