"""Nodes of conf/ without Hydra, which a machine with a GPU need not have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from runner.records.cells import Cell, freeze_cell, make_cells
from runner.records.config import target_class, typed

CONF = Path(__file__).parents[1] / "conf"
PRECISIONS = sorted(file.stem for file in (CONF / "precision").glob("*.yaml"))


def node(group: str, name: str) -> dict[str, Any]:
    """Return conf/GROUP/NAME.yaml, merged with the files of its own group that it builds on."""
    own = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in own.pop("defaults", ["_self_"]):
        _merge(merged, own if base == "_self_" else node(group, base))
    return merged


def shipped(group: str, name: str) -> Any:
    """Return the config that conf/GROUP/NAME.yaml describes."""
    given = node(group, name)
    return typed(group, target_class(group, given.pop("_target_")), given)


def _merge(into: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def tiny_cell(
    root: Path,
    text: Path,
    train: Mapping[str, Any],
    precision: str = "fp32",
    seed: int = 0,
    lr: float = 3e-3,
) -> Cell:
    """Return a frozen cell of the smallest model with dropout, on the bytes of `text`.

    Args:
        train: keys of its TrainConfig.
    """
    names = {"work": "train", "tokenizer": "bytes", "task": "language_modelling"}
    names |= {"optim": "adamw", "schedule": "cosine", "model": "gpt_pico", "precision": precision}
    given = {group: node(group, name) for group, name in names.items()}
    given["model"] |= {"dropout": 0.1}
    given["optim"] |= {"lr": lr}
    given["data"] = node("data", "text") | {"split": "tail"}
    given["data"]["sources"] = [{"format": "text", "path": str(text)}]
    given["train"] = node("train", "default") | dict(train)
    given["eval"] = {"_target_": "runner.evaluate.config.EvalConfig", "every": 1000, "tokens": 256}
    given["track"] = node("track", "default") | {"uri": "off"}
    given["resources"] = {"_target_": node("resources", "default")["_target_"]}
    (cell,) = make_cells([(str(seed), given | {"root": str(root), "seed": seed})])
    freeze_cell(cell)
    return cell
