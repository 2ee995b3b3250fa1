"""Checkpoints: a folder that appears whole or not at all, with a checksum for each file.

    checkpoints/00000200/{model.safetensors, optimizer.safetensors, state.json, manifest.json}

No pickles: tensors are safetensors, the rest is JSON. Optimiser tensors are named
`<optimiser>/<parameter>/<slot>`, so a checkpoint does not depend on how many processes wrote it.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runner.errors import CheckpointError, StorageError


def save(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `state["step"]` under `folder` and return its path.

    Raises:
        StorageError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    final = folder / f"{state['step']:08d}"
    partial = folder / f".partial-{final.name}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_model_tensors(model), partial / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizers), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state))
        sums = {f.name: _sha256(f) for f in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(sums))
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise StorageError(
            f"checkpoint at step {state['step']} not written to {folder}: {reason}; free space or change root=, then run the same command again"
        ) from error
    return final


def newest(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint; a damaged one is named in a warning and passed over."""
    for path in listing(folder)[::-1]:
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(
            f"checkpoint {path} is damaged ({problem}); using an earlier one", stacklevel=2
        )
    return None


def listing(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir())


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is."""
    try:
        sums = json.loads((path / "manifest.json").read_text())
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Fill `model` and `optimizers` in place and return the saved state.

    Raises:
        CheckpointError: the checkpoint's tensors are not this model's.
    """
    load_weights(path, model)
    saved = load_file(path / "optimizer.safetensors")
    for number, (optimizer, names) in enumerate(_named(model, optimizers)):
        for parameter, name in names.items():
            prefix = f"{number}/{name}/"
            slots = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
            # A step counter stays on the CPU unless the fused kernel wants it on the device.
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in slots.items()}
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill the weights of `model` in place; see `load`."""
    saved = load_file(path / "model.safetensors")
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    theirs = {name: tensor.shape for name, tensor in saved.items()}
    if own != theirs:
        odd = sorted(n for n in own.keys() | theirs.keys() if own.get(n) != theirs.get(n))[:3]
        parts = [f"{n}: {theirs.get(n)} saved, {own.get(n)} wanted" for n in odd]
        raise CheckpointError(
            f"{path} is a checkpoint of another model ({'; '.join(parts)}); load it with the config in its cell.json"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])


def prune(folder: Path, *, keep_last: int, keep_every: int | None, best: int | None) -> None:
    """Delete what the retention policy does not name."""
    for path in listing(folder)[: -max(1, keep_last)]:
        step = int(path.name)
        if step != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}


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
        f"{number}/{name}/{slot}": value.detach().cpu().contiguous()
        for number, (optimizer, names) in enumerate(_named(model, optimizers))
        for parameter, name in names.items()
        for slot, value in optimizer.state[parameter].items()
    }


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
