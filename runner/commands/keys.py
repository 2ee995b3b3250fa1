"""`espalier keys`: the keys that can be set, with type and default, from the config classes."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml

from runner.commands.arguments import RUN
from runner.machine.errors import ConfigError
from runner.records.config import NODES, SETTINGS, RunConfig, target_class

app = typer.Typer()
_CONF = Path(__file__).parents[2] / "conf"
_GROUPS = ("work", *NODES, *SETTINGS)


@app.command(rich_help_panel=RUN)
def keys(
    group: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(_GROUPS)}; default: all.")
    ] = None,
) -> None:
    """List the keys that can be set, with type and default, a block for each config class."""
    if group is not None and group not in _GROUPS:
        raise ConfigError(f"{group} is no group; there are: {', '.join(_GROUPS)}")
    if group is None:
        for field in dataclasses.fields(RunConfig):
            if field.name not in _GROUPS:
                typer.echo(_line(field.name, field))
    for name in (group,) if group else _GROUPS:
        for cls, choices in _classes(name).items():
            typer.echo(f"\n{name}={'|'.join(choices)}")
            for key, field in _fields(name, cls):
                typer.echo(_line(key, field))


def _classes(group: str) -> dict[Any, list[str]]:
    """Return the config classes of a group, each with the choices of the group that name it."""
    classes: dict[Any, list[str]] = {}
    for file in sorted((_CONF / group).glob("*.yaml")):
        node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if "_target_" in node:
            classes.setdefault(target_class(group, node["_target_"]), []).append(file.stem)
    return classes


def all_keys() -> Iterator[tuple[str, list[str]]]:
    """Yield (key, what it may be set to) of each key; an empty list where that is no choice."""
    for name in _GROUPS:
        yield name, [file.stem for file in sorted((_CONF / name).glob("*.yaml"))]
        for cls in _classes(name):
            for key, field in _fields(name, cls):
                yield key, _choices(field.type)
    for field in dataclasses.fields(RunConfig):
        if field.name not in _GROUPS:
            yield field.name, []


def _choices(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for inner in get_args(kind) for choice in _choices(inner)]


def _fields(path: str, cls: Any) -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Yield (dotted key, field) of a config class and of those within it."""
    for field in dataclasses.fields(cls):
        yield f"{path}.{field.name}", field
        items = field.metadata.get("items")
        if items is not None:
            yield from _fields(f"{path}.{field.name}.0", items)
        for inner in (field.type, *get_args(field.type)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from _fields(f"{path}.{field.name}", inner)


def _line(key: str, field: "dataclasses.Field[Any]") -> str:
    kind = field.type if isinstance(field.type, str) else _name(field.type)
    default = ""
    if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(field.default):
        default = f" = {field.default!r}"
    return f"  {key}: {kind}{default}"


def _name(kind: Any) -> str:
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "")
