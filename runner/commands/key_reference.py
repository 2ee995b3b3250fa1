"""The keys that can be set, read from the config classes that `conf/` names.

A key's meaning is its line under `Args:` in the docstring of its class or of a class above it.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from models.config import configs_in
from runner.grid.language import Block, Grid
from runner.records.config import NODES, SETTINGS, RunConfig, target_class

CONF = Path(__file__).parents[2] / "conf"
GROUPS = ("work", *NODES, *SETTINGS)
# Folders that hold a node within a group's, and where it stands.
WITHIN = {
    "model/part": "model.parts.LETTER",
    "model/streams": "model.streams",
    "model/adapter": "model.adapter",
    "model/rounding": "model.rounding",
    "eval/also": "eval.also.NAME",
    "parser": "NODE.parser",
    "scorer": "NODE.scorer",
    "tool": "NODE.tools.NAME",
}
# What Hydra instantiates takes any keyword; its keys are checked by these.
OF_HYDRA = {
    "hydra/sweeper": {
        "grid": "runner.commands.sweep_keys.GridKeys",
        "optuna": "runner.launch.study_config.StudyConfig",
    },
    "hydra/launcher": {
        "local": "runner.commands.sweep_keys.LocalKeys",
        "slurm": "runner.launch.slurm.SlurmConfig",
    },
}
_ARGS = re.compile(r"^Args:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
_ARGUMENT = re.compile(r" {4}(\w[\w, ]*): (.*)")


@dataclasses.dataclass(frozen=True)
class Key:
    """A key: its dotted path, type, default and meaning; whether it cannot change a result."""

    path: str
    type: Any
    default: Any
    meaning: str
    execution: bool

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def choices(self) -> list[str]:
        """What it may be set to; empty where that is no choice."""
        return _choices(self.type)

    @property
    def kind(self) -> str:
        """Its type as text: `int | None`, `relu or gelu`."""
        return _kind(self.type)


@dataclasses.dataclass(frozen=True)
class KeyBlock:
    """The keys of one config class, and the choices of the group that name it."""

    group: str
    choices: list[str]
    summary: str
    keys: list[Key]


def blocks(group: str) -> Iterator[KeyBlock]:
    """Yield the blocks of a group, of a folder below one, or of "" for the keys of no group."""
    if not group:
        own = [key for key in _keys("", RunConfig, False) if key.path not in GROUPS]
        yield KeyBlock("", [], "The keys of a run that belong to no group.", own)
        return
    prefix = WITHIN.get(group, group.replace("/", "."))
    for cls, choices in _classes(group).items():
        summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
        yield KeyBlock(group, choices, summary, list(_keys(f"{prefix}.", cls, group in SETTINGS)))


def groups() -> list[str]:
    """Return all groups in order, each followed by the folders below it; "" first."""
    below = {group: [name for name in WITHIN if name.startswith(f"{group}/")] for group in GROUPS}
    inside = [name for name in WITHIN if name.partition("/")[0] not in GROUPS]
    return ["", *(n for group in GROUPS for n in (group, *below[group])), *inside, *OF_HYDRA]


def names_in(group: str) -> list[str]:
    """Return the choices of a group: the names of its files."""
    return [file.stem for file in sorted((CONF / group).glob("*.yaml"))]


def _classes(group: str) -> dict[Any, list[str]]:
    """Return the config classes of a group, each with the choices of the group that name it."""
    if group in OF_HYDRA:
        return {_named(path): [choice] for choice, path in OF_HYDRA[group].items()}
    classes: dict[Any, list[str]] = {}
    for name in names_in(group):
        node = yaml.load((CONF / group / f"{name}.yaml").read_bytes(), _LOADER) or {}
        if "_target_" in node:
            classes.setdefault(target_class(group, node["_target_"]), []).append(name)
    return classes


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _keys(prefix: str, cls: Any, execution: bool) -> Iterator[Key]:
    """Yield the keys of a config class and of those within it."""
    known = meanings(cls)
    for field in dataclasses.fields(cls):
        half = execution or bool(field.metadata.get("execution"))
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        path = f"{prefix}{field.name}"
        yield Key(path, field.type, default, known.get(field.name, ""), half)
        items = field.metadata.get("items")
        if items is not None:
            yield from _keys(f"{path}.0.", items, half)
        origin: Any = get_origin(field.type)
        below = {dict: "NAME.", tuple: "0."}.get(origin, "")
        for inner in configs_in(field.type):
            if not (issubclass(cls, Grid) and issubclass(inner, Block)):  # the same keys again
                yield from _keys(f"{path}.{below}", inner, half)


@cache
def meanings(cls: Any) -> dict[str, str]:
    """Return what the docstrings of `cls` and of the classes above it say of its fields."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        section = _ARGS.search(inspect.cleandoc(one.__dict__.get("__doc__") or ""))
        names: list[str] = []
        for line in (section[1] if section else "").splitlines():
            start = None if line.startswith(" " * 5) else _ARGUMENT.match(line)
            if start:
                names = [name.strip() for name in start[1].split(",")]
                found |= dict.fromkeys(names, start[2])
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in names if line.strip()}
    return found


def _choices(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for inner in get_args(kind) for choice in _choices(inner)]


def _kind(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    inner = ["..." if part is Ellipsis else _kind(part) for part in get_args(kind)]
    if get_origin(kind) in (dict, list, tuple):
        return f"{get_origin(kind).__name__}[{', '.join(inner)}]"
    return "|".join("null" if part == "NoneType" else part for part in inner) or "any"
