"""Loading the model and the tokenizer of a trained cell."""

from pathlib import Path
from typing import Any

from models.adapter import adapter_names
from models.language_model import LanguageModel
from models.pretrained import load_weights
from runner.data import pretrained
from runner.data.corpus import load_tokenizer, num_added
from runner.data.tokenizers import Tokenizer
from runner.machine.errors import CheckpointError, ConfigError
from runner.records import checkpoint, checkpoint_folder
from runner.records.cells import Cell, load_cell
from runner.records.contracts import stored_form


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's, not that of a model made elsewhere."""
    return (folder / "cell.json").exists()


def load_model(folder: Path, *, average: bool = False) -> tuple[LanguageModel, Tokenizer, int]:
    """Return (model with the newest weights, tokenizer, longest trained sequence in tokens).

    `average` loads the weights averaged over training instead.

    Raises:
        CheckpointError: the run has no checkpoint yet.
    """
    cell = load_cell(folder)
    newest = checkpoint_folder.newest(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"{folder} has no checkpoint; train the cell first (state: {cell.state})"
        )
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model = cell.config.model.build(tokenizer.vocab_size, cell.config.seed)
    model.added_rows = num_added(tokenizer)
    load_trained(cell, newest, model, average=average)
    context = cell.config.train.sequence_length
    if cell.config.init is not None:  # its pretraining may have used longer sequences
        context = max(context, getattr(cell.config.model, "context_length", context))
    return model, tokenizer, context


def load_trained(cell: Cell, saved: Path, model: Any, *, average: bool = False) -> None:
    """Fill `model` from a checkpoint of `cell`, and below its adapters from the base.

    Raises:
        CheckpointError: see `checkpoint.load_weights` and `load_base`.
    """
    stored_form(cell.config.work, model)
    load_base(cell, model)
    checkpoint.load_weights(saved, model, average=average)


def load_base(cell: Cell, model: Any) -> None:
    """Load what lies below the adapters of a model, which no checkpoint holds.

    Without adapters nothing is loaded; without `init` the base is what the seed gives.

    Raises:
        CheckpointError: the folder of `init` holds other weights than those the cell was frozen
            with.
    """
    init = cell.config.init
    if init is None or not adapter_names(model):
        return
    there = pretrained.content_hash(init)
    if there != cell.science["init"]:
        raise CheckpointError(
            f"{cell.folder} has an adapter of another base: init={init} holds weights {there[:8]}, "
            f"it was trained on {cell.science['init'][:8]}; put the model back"
        )
    load_weights(pretrained.pretrained_folder(init), model, put=checkpoint.like)


def refuse_other_adapter(cell: Cell, start: Cell) -> None:
    """Check that the adapters of `cell` can start from those of the run `start`.

    Raises:
        ConfigError: that has none, others, or such of another base, or `cell` starts from a folder
            of peft too.
    """
    own, theirs = cell.config.model.adapter, getattr(start.config.model, "adapter", None)
    if theirs is None:
        raise ConfigError(
            f"inputs.init.runs=[{start.fingerprint}] has no adapter, and model.adapter needs a "
            f"folder as its base; write it: espalier export {start.fingerprint} DIR, and give "
            "init=hf:DIR without inputs.init"
        )
    if own.start is not None:
        raise ConfigError(
            f"model.adapter.start={own.start} and inputs.init.runs=[{start.fingerprint}]: an "
            "adapter starts from one; leave one out"
        )
    for key in ("kind", "rank", "alpha", "targets"):
        if getattr(own, key) != getattr(theirs, key):
            raise ConfigError(
                f"inputs.init.runs=[{start.fingerprint}] has model.adapter.{key}="
                f"{getattr(theirs, key)}, this run {getattr(own, key)}; give the same"
            )
    bases = [str(one.science.get("init", "")) for one in (cell, start)]
    if bases[0] != bases[1] or not bases[0]:
        raise ConfigError(
            f"inputs.init.runs=[{start.fingerprint}] has an adapter of another base "
            f"({bases[1][:8] or 'none'}, init of this run is {bases[0][:8] or 'none'}); give "
            f"init={start.config.init}"
        )
