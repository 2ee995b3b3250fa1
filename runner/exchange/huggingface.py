"""Export of a trained cell as a Hugging Face folder: weights, config, tokenizer, model card."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.adapter import merge
from models.language_model import LanguageModel
from models.pretrained import save_pretrained
from models.rounded_linear import plain_layers
from models.stored_linear import decompress, stored_layers
from runner.exchange.model_card import model_card
from runner.exchange.tokenizer import can_write, model_ids, write_tokenizer
from runner.generate.text_generator import DTYPES
from runner.machine.errors import ConfigError
from runner.records.cells import Cell
from runner.records.trained_model import load_model


def export(
    cell: Cell,
    folder: Path,
    *,
    layout: str | None = None,
    dtype: str = "fp32",
    max_shard_size: str = "5GB",
    license_name: str | None = None,
    average: bool = False,
    compressed: bool = False,
) -> str:
    """Write the newest weights of `cell` into a new `folder`; return the architecture written.

    Adapters are merged into the weights, in full precision.

    Args:
        layout: llama, qwen3, gpt2 or espalier (None: the first that fits).
        dtype: of the weights written: fp32, bf16 or fp16.
        max_shard_size: the largest size of a safetensors file.
        license_name: for the model card.
        average: export the averaged weights (train.average).
        compressed: write the weights of a quantised run in its few bits, as compressed-tensors
            reads them; else as what they stand for.

    Raises:
        ConfigError: `dtype` is unknown, the folder is not empty, the layout does not fit the
            model, or the model is not one of ours.
        CheckpointError: the cell has no checkpoint.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is none of: {', '.join(DTYPES)}")
    model, tokenizer, context = load_model(cell.folder, average=average)
    if not can_write(tokenizer):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no form that transformers reads; train with "
            "tokenizer=bytes, char, bpe, unigram, wordpiece or folder"
        )
    if not isinstance(model, LanguageModel):
        raise ConfigError(
            f"{type(model).__name__} is in no layout that transformers reads; its weights are in "
            f"{cell.folder}/checkpoints/*/model.safetensors"
        )
    if compressed and not stored_layers(model):
        raise ConfigError(f"{cell.folder} is not quantised: espalier quantise RUN makes what is")
    try:
        model = merge(model) if compressed else decompress(plain_layers(merge(model)))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    cfg: Any = model.cfg
    if getattr(cfg, "positions", None) == "rope":  # its context is the training length
        model.cfg = replace(cfg, context_length=context)
    fresh = not folder.exists()
    try:
        architecture = save_pretrained(
            model,
            folder,
            layout=layout,
            dtype=DTYPES[dtype],
            max_shard_size=max_shard_size,
            extra_keys=model_ids(tokenizer) | _shift(cell.config.task),
        )
        write_tokenizer(tokenizer, folder, context)
        card = model_card(cell, architecture, dtype, license_name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    except (FileExistsError, ValueError) as error:
        raise ConfigError(str(error)) from error
    finally:
        if fresh and not (folder / "README.md").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return architecture


def _shift(task: Any) -> dict[str, bool]:
    """Return the key of config.json that says that the outputs of a diffusion model are shifted."""
    return {"shift": True} if getattr(task, "shift", False) else {}
