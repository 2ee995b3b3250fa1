"""Nodes of conf/ without Hydra, which a machine with a GPU need not have."""

from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).parents[2] / "conf"
PRECISIONS = sorted(file.stem for file in (CONF / "precision").glob("*.yaml"))


def node(group: str, name: str) -> dict[str, Any]:
    """Return conf/GROUP/NAME.yaml, merged with the files of its own group that it builds on."""
    own = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in own.pop("defaults", ["_self_"]):
        _merge(merged, own if base == "_self_" else node(group, base))
    return merged


def _merge(into: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
