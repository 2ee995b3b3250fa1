"""A trained model that computes as in training: under the precision recipe of its run."""

from pathlib import Path
from typing import Any

import torch

from models.precision import Precision
from runner.records import checkpoint
from runner.records.cells import load_cell
from runner.records.checkpoint_folder import newest


def recipe_of_training(folder: Path, model: Any, device: torch.device) -> Precision:
    """Prepare `model` for the recipe of the run in `folder`; return the recipe.

    Scales of delayed scaling are those of the newest checkpoint. Nothing is rounded by dice. A
    scale of a whole tensor spans all rows of a batch: they change each other's bits.
    """
    precision: Precision = load_cell(folder).config.precision.build(device)
    precision.prepare(model)
    saved = newest(folder / "checkpoints")
    if saved is not None:
        precision.load(checkpoint.load_tensors(saved, "precision"))
    return precision


def compute_under(precision: Precision, model: Any) -> None:
    """Make every forward pass of `model` one under `precision`."""
    forward = model.forward

    def under_recipe(*args: Any, **more: Any) -> Any:
        with precision.autocast():
            return forward(*args, **more)

    model.forward = under_recipe


def in_words(precision: Precision) -> str:
    """Return the dtype, the formats of fprop's operands, how many layers have them, and backends.

    `bf16; nvfp4 1x16 te214 RNE, nvfp4 16x16 te214 RNE in 6 of 8 linear layers (emulated on cpu)`
    """
    rows = [row for row in precision.table if row.operand.startswith("fprop")]
    low = [row for row in rows if row.format != precision.compute]
    if not low:
        return precision.compute
    formats, backends = (
        ", ".join(dict.fromkeys(getattr(r, field) for r in low)) for field in ("format", "backend")
    )
    layers, quantised = ({row.layer for row in given} for given in (rows, low))
    return (
        f"{precision.compute}; {formats} in {len(quantised)} of {len(layers)} linear layers "
        f"({backends})"
    )
