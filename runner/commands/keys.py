"""`espalier keys`: the keys that can be set, with type, default and meaning."""

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.commands.arguments import RUN
from runner.machine import storage
from runner.machine.errors import ConfigError, StorageError

app = typer.Typer()
_CODE = Path(__file__).parents[2]
_CACHES = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
_KEPT = Path(_CACHES) / "espalier" / "keys.txt"
_WIDTH = 96
_AS_YAML = {"None": "null", "True": "true", "False": "false"}
_NONE = re.compile(r"\b(None|True|False)\b")


def _beginnings(incomplete: str) -> list[str]:
    from runner.commands.completion import continuations  # noqa: PLC0415

    return [word.rstrip("=") for word in continuations(incomplete.partition("=")[0])]


@app.command(rich_help_panel=RUN)
def keys(
    node: Annotated[
        str | None,
        typer.Argument(
            help="A group (optim, model/part), a key or its beginning; default: all.",
            autocompletion=_beginnings,
        ),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="A JSON schema of sweep.yaml, by which an editor completes."),
    ] = False,
) -> None:
    """List the keys that can be set: type, default, meaning, and whether they change the result.

    A key marked [execution] cannot change a result: a run keeps its name whatever it is set to.
    """
    if schema:
        from runner.commands.sweep_schema import sweep_schema  # noqa: PLC0415

        typer.echo(json.dumps(sweep_schema(), indent=1))
        return
    typer.echo(_text(node) if node else kept_text(_KEPT, sources_state(_CODE), lambda: _text(None)))


def _text(node: str | None) -> str:
    return "\n".join(_lines(node)).lstrip("\n")


def sources_state(code: Path) -> str:
    """Return a digest that changes with any file below `code` that the keys are read from."""
    digest = hashlib.sha256()
    for folder, kind in (("models", "py"), ("runner", "py"), ("conf", "yaml")):
        for file in sorted((code / folder).rglob(f"*.{kind}")):
            stat = file.stat()
            digest.update(f"{file} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    return digest.hexdigest()


def kept_text(file: Path, state: str, make: Callable[[], str]) -> str:
    """Return the text that `file` keeps of this `state`, or else `make()`, which is kept then.

    To import a hundred classes for their docstrings takes longer than a reader wants to wait.
    """
    with suppress(OSError, UnicodeDecodeError):
        kept, _, text = file.read_text(encoding="utf-8").partition("\n")
        if kept == state:
            return text
    text = make()
    with suppress(OSError, StorageError):  # a home that cannot be written
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(file, f"{state}\n{text}")
    return text


def _lines(node: str | None) -> Iterable[str]:
    """Return the lines of a group, of a key and those below it, or of all."""
    from runner.commands.key_reference import blocks, groups  # noqa: PLC0415

    asked = (node or "").rstrip(".=")
    first = asked.partition(".")[0].partition("/")[0]
    among = [g for g in groups() if node is None or g.partition("/")[0] in ("", first)]
    lines: list[str] = []
    for group in among:
        whole = node is None or (group and (asked == group or group.startswith(f"{asked}/")))
        for block in blocks(group):
            path = asked.replace("/", ".")
            kept = [k for k in block.keys if whole or f"{k.path}.".startswith(f"{path}.")]
            kept = kept or [k for k in block.keys if k.path.startswith(path)]
            if kept or whole:
                lines += ["", _head(block), *(line for key in kept for line in _entry(key))]
    if not lines:
        raise ConfigError(
            f"{node} is no group and no key; there are: {', '.join(filter(None, groups()))}, and "
            "`espalier keys` lists all keys"
        )
    return lines


def _head(block: Any) -> str:
    if not block.group:
        return str(block.summary)
    return f"{block.group}={'|'.join(block.choices)}: {block.summary}"


def _entry(key: Any) -> list[str]:
    """Return the lines of a key: `optim.lr: float = 0.003`, and its meaning below."""
    default = as_yaml(key)
    half = "  [execution]" if key.execution else ""
    indent = " " * 6
    meaning = in_yaml(key.meaning)
    lines = textwrap.wrap(meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [f"  {key.path}: {key.kind}{default and f' = {default}'}{half}", *lines]


def as_yaml(key: Any) -> str:
    """Return a key's default as an override would write it; "" if it has none of its own."""
    value = key.default
    if key.required or is_dataclass(value):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def in_yaml(text: str) -> str:
    """Return a docstring's words with null, true and false for Python's names."""
    return _NONE.sub(lambda word: _AS_YAML[word[0]], text)
