"""Models that a task compares with and does not train: a reference, a teacher."""

from copy import deepcopy
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from models.config import plain
from models.pretrained import load_pretrained, load_weights
from runner.data.corpus import load_tokenizer, tokenizer_hash
from runner.data.pretrained import content_hash
from runner.exchange.peft import read_adapter
from runner.machine.errors import ConfigError
from runner.records import checkpoint, checkpoint_folder
from runner.records.cells import load_cell
from runner.records.contracts import Inputs
from runner.records.trained_model import is_run, load_model, load_trained


def frozen_like(model: Any, key: str, name: str, inputs: Inputs, tokenizer: Any) -> nn.Module:
    """Return a copy of `model`, prepared for the same precision, with the weights of an input.

    At the first step it computes the same bits as a model that starts from that input. A run of
    another model is returned as that.

    Args:
        key: of the config, for messages.
        name: of the input.

    Raises:
        ConfigError: there is no such input, or its tokenizer is another one.
        CheckpointError: it has no checkpoint.
    """
    if _is_planned(model):
        return _frozen(_copy(model))
    folder = _folder(key, name, inputs, tokenizer)
    if not is_run(folder):
        copy = _copy(model)
        load_weights(folder, copy, put=checkpoint.like)
        adapter = getattr(getattr(copy, "cfg", None), "adapter", None)
        if adapter is not None and adapter.start is not None:
            read_adapter(Path(adapter.start), copy, adapter, content_hash(f"hf:{folder}"))
        return _frozen(copy)
    cell, saved = load_cell(folder), checkpoint_folder.newest(folder / "checkpoints")
    if saved is None or not _alike(cell.config.model, getattr(model, "cfg", None)):
        return frozen_model(model, key, name, inputs, tokenizer)
    copy = _copy(model)
    load_trained(cell, saved, copy)
    return _frozen(copy)


def frozen_model(model: Any, key: str, name: str, inputs: Inputs, tokenizer: Any) -> nn.Module:
    """Return the model of an input with its own config, its products in no quantised format.

    It is on the device of `model`, which learns.

    Raises:
        ConfigError, CheckpointError: see `frozen_like`.
    """
    if _is_planned(model):
        return _frozen(_copy(model))
    folder = _folder(key, name, inputs, tokenizer)
    other = load_model(folder)[0] if is_run(folder) else load_pretrained(folder)
    return _frozen(other.to(next(model.parameters()).device))


def load_frozen(part: Any, key: str, name: str, inputs: Inputs, tokenizer: Any) -> None:
    """Fill a part of a model, which does not learn, with the weights of an input.

    Raises:
        ConfigError: see `frozen_like`; or the input is no run.
        CheckpointError: it has no checkpoint, or is another model.
    """
    if _is_planned(part):
        return
    folder = _folder(key, name, inputs, tokenizer)
    saved = checkpoint_folder.newest(folder / "checkpoints") if is_run(folder) else None
    if saved is None:
        raise ConfigError(f"{key}: input {name} is no run with a checkpoint: {folder}; train it")
    load_trained(load_cell(folder), saved, part)


def _folder(key: str, name: str, inputs: Inputs, tokenizer: Any) -> Path:
    """Return the folder of an input whose tokenizer is `tokenizer`."""
    if name not in inputs or len(inputs[name]) != 1:
        raise ConfigError(
            f"{key}={name}: no input of one run has this name; there are: "
            f"{', '.join(inputs) or 'none'}; name one in `inputs`, or in `from` of the stage"
        )
    folder = inputs[name][0]
    if is_run(folder):
        theirs = tokenizer_hash(load_tokenizer(folder / "tokenizer.json"))
        if theirs != tokenizer_hash(tokenizer):
            raise ConfigError(
                f"{key}={name}: run {folder.name} has another tokenizer ({theirs[:8]}, this run's "
                f"is {tokenizer_hash(tokenizer)[:8]}): the same ids would be other texts; give "
                "this run its tokenizer, or name a run that has this one"
            )
    return folder


def _is_planned(model: nn.Module) -> bool:
    """Return whether only the memory of the model is counted: inputs need not be there yet."""
    return isinstance(next(model.parameters()), FakeTensor)


def _alike(theirs: Any, own: Any) -> bool:
    """Return whether two configs are of one model, whatever concerns its training."""
    if not (is_dataclass(theirs) and is_dataclass(own) and type(theirs) is type(own)):
        return False
    both = [plain(cfg, target=True) for cfg in (theirs, own)]
    for config in both:
        for key in ("dropout", "neftune", "z_loss"):
            config.pop(key, None)
        (config.get("adapter") or {}).pop("start", None)
    return bool(both[0] == both[1])


def _copy(model: Any) -> Any:
    """Return a copy of a prepared model, which follows the same switches of its precision."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
    memo |= {id(b): b.detach().clone() for b in model.buffers()}  # fake ones have no deepcopy
    shared = [m.shared for m in model.modules() if hasattr(m, "shared")]
    return deepcopy(model, memo | {id(switches): switches for switches in shared})


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(requires_grad=False)
