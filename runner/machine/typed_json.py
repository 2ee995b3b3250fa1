"""JSON records that other processes wrote, checked for the keys and types that a reader needs.

A shape is a type that pydantic knows, mostly a TypedDict. Keys that it does not name are left
alone: later releases may write them.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.machine.errors import DataError
from runner.machine.text_files import read_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

_SHOWN = 40  # characters of a value


def read_record(file: Path, shape: Any = dict[str, Any]) -> dict[str, Any]:
    """Return the object of `shape` that a JSON file holds.

    Raises:
        DataError: the file is missing, not JSON or not of this shape; it is named.
    """
    value: dict[str, Any] = checked(read_json(file), shape, str(file))
    return value


def checked(value: Any, shape: Any, where: str) -> Any:
    """Return `value`, which is to be of `shape`.

    Args:
        where: its place, for the message.

    Raises:
        DataError: it is not; the message names the place and the key.
    """
    problem = mismatch(value, shape)
    if problem is not None:
        raise DataError(f"{where} {problem}; mend or remove it")
    return value


def mismatch(value: Any, shape: Any) -> str | None:
    """Return how `value` is not of `shape`, "has no 'step'"; None if it is."""
    from pydantic import ValidationError  # noqa: PLC0415  (0.1 s, which help and Tab do without)

    try:
        adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        return _explain(value, error)
    return None


def _explain(value: Any, error: "ValidationError") -> str:
    if not isinstance(value, dict):
        return f"holds {value!r:.{_SHOWN}}, which is not a JSON object"
    first = error.errors()[0]
    loc, said = first["loc"], first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"has no {'.'.join(map(str, loc))!r}"
    if not loc:
        return said
    if not _leads(value, loc):  # the name of a union's branch ends the path
        loc = loc[:-1]
    return f"holds {'.'.join(map(str, loc))}={first['input']!r:.{_SHOWN}}: {said}"


def _leads(value: Any, loc: Sequence[int | str]) -> bool:
    """Return whether each part of `loc` is a key or an index of what the parts before lead to."""
    try:
        for part in loc:
            value = value[part]
    except (LookupError, TypeError):
        return False
    return True


@lru_cache
def adapter(shape: Any) -> "TypeAdapter[Any]":
    """Return the pydantic adapter of a type, built once."""
    from pydantic import TypeAdapter  # noqa: PLC0415

    return TypeAdapter(shape)
