"""Adapters in peft's file format: adapter_config.json and adapter_model.safetensors.

peft itself is never imported. Names of layers are those of transformers, so that the base must be
in a layout that transformers knows and that stores q, k and v apart (Llama's, not GPT-2's).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.adapter import AdaptedLinear, adapted_layers
from models.adapter_config import AdapterConfig
from models.decoder_config import DecoderConfig
from models.pretrained import LAYOUTS
from runner.machine.errors import ConfigError, DataError
from runner.machine.system_errors import write_error
from runner.machine.typed_json import read_record
from runner.records.cells import Cell
from runner.records.trained_model import load_model

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_BASE = "espalier_base"  # the hash of the base's weights, in the metadata of the tensors


def export_adapter(cell: Cell, folder: Path, *, average: bool = False) -> None:
    """Write the newest adapter of `cell` into a new `folder`.

    Raises:
        ConfigError: the cell has no adapter, its base is in no layout that peft can name, or the
            folder is not empty.
        CheckpointError: the cell has no checkpoint, or its base has changed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose a new folder")
    cfg = getattr(cell.config.model, "adapter", None)
    if cfg is None:
        raise ConfigError(f"{cell.folder} has no adapter; export it with --to hf")
    model, _, _ = load_model(cell.folder, average=average)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in _named_tensors(model)}
    modules = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors})
    content = _config_of(cfg, modules, str(cell.config.init or "").removeprefix("hf:"))
    metadata = {"format": "pt", _BASE: str(cell.science.get("init", ""))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _WEIGHTS, metadata=metadata)
        (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise write_error(folder, error) from error


def _config_of(cfg: AdapterConfig, modules: list[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "use_rslora": cfg.kind == "rslora",
        "use_dora": cfg.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def read_adapter(folder: Path, model: nn.Module, cfg: AdapterConfig, base: str) -> None:
    """Fill the adapters of `model` from a folder of peft, in place.

    Args:
        cfg: the adapters' config, which the folder must agree with.
        base: the hash of the base's weights.

    Raises:
        DataError: a file is missing or damaged, or the adapter is of another kind, rank or base.
    """
    config = read_record(folder / _CONFIG)
    kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    found = {"kind": kind, "rank": config.get("r"), "alpha": config.get("lora_alpha")}
    own = {"kind": cfg.kind, "rank": cfg.rank, "alpha": cfg.alpha}
    for key, value in found.items():
        if value != own[key]:
            raise DataError(
                f"{folder} has {key}={value}, model.adapter.{key} is {own[key]}; give {value}"
            )
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if patterns or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise DataError(
            f"{folder}: an adapter with {', '.join(patterns) or 'bias or modules_to_save'} is not "
            "read; merge it with peft and start from the merged model"
        )
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:  # type: ignore[no-untyped-call]
            made_for = (file.metadata() or {}).get(_BASE, base)
            tensors = {_plain(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / _WEIGHTS} cannot be read ({error}); fetch it again") from None
    if made_for != base:
        raise DataError(
            f"{folder} is an adapter of another base (weights {made_for[:8]}, here {base[:8]}); "
            "give the model that it was trained on as init"
        )
    _fill(model, tensors, folder)


def _fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    targets = dict(_named_tensors(model))
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    if theirs != ours:
        names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise DataError(
            f"{folder} is an adapter of another base, or of other layers ({names[0]}: "
            f"{theirs.get(names[0])} there, {ours.get(names[0])} wanted); give the base that it "
            "was trained on, and its layers as model.adapter.targets"
        )
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(tensors[name])


def _plain(name: str) -> str:
    """Return the name that peft wrote before it gave DoRA's lengths a module of their own."""
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def _named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in peft, tensor) of all adapters; DoRA's lengths by part.

    Raises:
        ConfigError: the base is in no layout that names its layers apart.
    """
    names = _names_in_transformers(model)
    for name, layer in adapted_layers(model).items():
        theirs = names.get(f"{name}.weight", ())
        if len(theirs) != len(layer.rows):
            raise ConfigError(
                f"{name} is not made of {len(layer.rows)} layers of transformers; peft cannot name "
                "its adapter. Merge it: export --to hf"
            )
        yield from _tensors_of(layer, [n.removesuffix(".weight") for n in theirs])


def _tensors_of(layer: AdaptedLinear, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for part, name in zip(layer.rows, names, strict=True):
        if part in layer.a:
            yield f"{_PREFIX}{name}.lora_A.weight", layer.a[part]
            yield f"{_PREFIX}{name}.lora_B.weight", layer.b[part]
        if part in layer.magnitude:
            yield f"{_PREFIX}{name}.lora_magnitude_vector", layer.magnitude[part]


def _names_in_transformers(model: Any) -> dict[str, tuple[str, ...]]:
    """Return the tensors of transformers that each weight of the base is made of."""
    cfg = model.cfg
    for layout in LAYOUTS if isinstance(cfg, DecoderConfig) else ():
        if isinstance(layout.write(cfg, model.vocab_size), dict):
            return {name: source.names for name, source in layout.sources(cfg).items()}
    raise ConfigError(
        f"{type(cfg).__name__} is in no layout of transformers, so peft cannot name its layers; "
        "merge the adapter: export --to hf"
    )
