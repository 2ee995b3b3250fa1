"""Checkpoints: folders that appear in one rename, with a checksum for each file.

    checkpoints/00000200/{model,optimizer,average,precision}.safetensors, {state,manifest}.json

Tensors are safetensors, the rest is JSON; nothing is pickled. Rank 0 gathers each tensor from its
shards, one by one, and names optimiser tensors `<optimiser>/<parameter>/<slot>`: a checkpoint does
not depend on how many processes wrote it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.adapter import trained_state
from models.contract import with_added_rows
from models.rounded_linear import start_steps, step_names
from runner.machine.errors import CheckpointError
from runner.machine.ranks import gather_full
from runner.machine.system_errors import write_error
from runner.records.checkpoint_folder import UNFINISHED, sha256

_NUMBER = "#number"  # ends the name of a slot that is no tensor but a Python number
Files = dict[str, dict[str, Tensor]]


def gather(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    more: Files,
    *,
    keep: bool,
) -> Files:
    """Return the files that `save` writes, with full tensors on the CPU; all ranks must call it.

    Args:
        more: tensors of further files, by the files' names.
        keep: false on ranks that only take part in gathering; they return files without tensors.
    """
    files = {"model": trained_state(model), "optimizer": _optimizer_tensors(model, optimizers)}
    files |= {name: tensors for name, tensors in more.items() if tensors}
    gathered: Files = {file: {} for file in files}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            value = gather_full(tensor.detach())
            if keep:
                gathered[file][name] = value.cpu().contiguous()
    return gathered


def save(folder: Path, files: Files, state: dict[str, Any]) -> Path:
    """Write the checkpoint of step `state["step"]` under `folder` and return its path.

    Raises:
        StorageError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    final = folder / f"{state['step']:08d}"
    partial = folder / f"{UNFINISHED}{final.name}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(tensors, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state))
        for file in partial.glob("*.safetensors"):  # made for their owner alone, whatever the umask
            shutil.copymode(partial / "state.json", file)
        sums = {f.name: sha256(f) for f in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(sums))
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_error(final, error) from error
    return final


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load into `model` and `optimizers` in place and return the saved state.

    Raises:
        CheckpointError: names or shapes of the tensors are not this model's.
    """
    load_weights(path, model)
    saved = load_file(path / "optimizer.safetensors")
    for number, (optimizer, names) in enumerate(_named(model, optimizers)):
        for parameter, name in names.items():
            prefix = f"{number}/{name}/"
            slots = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
            optimizer.state[parameter] = {
                k.removesuffix(_NUMBER): v.item() if k.endswith(_NUMBER) else like(v, parameter)
                for k, v in slots.items()
            }
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def load_average(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that `WeightAverage.load` takes, {} if no average was saved."""
    parameters = dict(model.named_parameters())
    saved = load_tensors(path, "average")
    return {k: like(v, parameters[k.partition("/")[2]]) for k, v in saved.items()}


def load_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file `name`.safetensors, {} if there is no such file."""
    file = path / f"{name}.safetensors"
    return load_file(file) if file.exists() else {}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return `value` on the device and in the shards of `parameter`; scalars are not sharded."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def load_weights(path: Path, model: nn.Module, *, average: bool = False) -> None:
    """Load the weights of `model` in place, of a model with adapters theirs only.

    `average` takes the averaged ones.

    Raises:
        CheckpointError: names or shapes are not this model's, or no average was saved.
    """
    saved = load_file(path / "model.safetensors")
    if average:
        saved |= _averaged(path)
    weights = trained_state(model)
    begun = step_names(model) - saved.keys()  # of a run that was trained in full
    weights = {name: tensor for name, tensor in weights.items() if name not in begun}
    saved = {
        name: with_added_rows(model, name, tensor, weights[name]) if name in weights else tensor
        for name, tensor in saved.items()
    }
    own = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if own != theirs:
        differing = sorted(n for n in own.keys() | theirs.keys() if own.get(n) != theirs.get(n))
        parts = [f"{n}: {theirs.get(n)} saved, {own.get(n)} wanted" for n in differing[:3]]
        raise CheckpointError(
            f"{path} is a checkpoint of another model ({'; '.join(parts)}); load it with the "
            "config in its cell.json"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(like(saved[name], tensor))
    if begun:
        start_steps(model)


def _averaged(path: Path) -> dict[str, Tensor]:
    file = path / "average.safetensors"
    if not file.exists():
        raise CheckpointError(
            f"{path} holds no averaged weights; train with train.average.kind=ema"
        )
    copies: dict[str, list[Tensor]] = {}
    for key, tensor in load_file(file).items():
        copies.setdefault(key.partition("/")[2], []).append(tensor)
    return {name: torch.stack(tensors).mean(dim=0) for name, tensors in copies.items()}


def _named(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> list[tuple[torch.optim.Optimizer, dict[Tensor, str]]]:
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    return [
        (o, {p: names[p] for group in o.param_groups for p in group["params"]}) for o in optimizers
    ]


def _optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    return {
        f"{number}/{name}/{slot}{'' if isinstance(value, Tensor) else _NUMBER}": _as_tensor(value)
        for number, (optimizer, names) in enumerate(_named(model, optimizers))
        for parameter, name in names.items()
        for slot, value in optimizer.state[parameter].items()
        if value is not None  # the optimiser makes such a slot again
    }


def _as_tensor(value: Any) -> Tensor:
    """Return a tensor as it is, a Python number as a tensor of 64 bits.

    Raises:
        CheckpointError: `value` is neither.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int)):
        return torch.tensor(value)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    raise CheckpointError(
        f"the state of an optimiser holds {value!r}; a checkpoint stores tensors and numbers only"
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
