"""JSON of run folders, checked for the keys and types that analysis needs; errors name the file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

Types = Mapping[str, type | tuple[type, ...]]
NUMBER = (int, float)
_SHOWN = 40  # characters of a value


def mismatch(value: Any, types: Types, optional: Types = MappingProxyType({})) -> str | None:
    """Return how `value` is no object with the keys of `types`, "has no 'step'"; None if it is one.

    Args:
        optional: types of keys that it need not have.
    """
    if not isinstance(value, dict):
        return f"holds {value!r:.{_SHOWN}}, which is not a JSON object"
    for key in types:
        if key not in value:
            return f"has no {key!r}"
    for key, kind in {**types, **optional}.items():
        if key in value and not isinstance(value[key], kind):
            return f"holds {key}={value[key]!r:.{_SHOWN}}"
    return None


def no_numbers(value: Any) -> str | None:
    """Return what in an object is no number; None if all values are numbers."""
    return mismatch(value, dict.fromkeys(value, NUMBER) if isinstance(value, dict) else {})


def parse_object(file: Path, content: bytes, types: Types) -> dict[str, Any]:
    """Return the object that a JSON file holds, with the keys of `types`.

    Raises:
        ValueError: it holds another thing; the file is named.
    """
    value = _parsed(content)
    problem = mismatch(value, types)
    if problem:
        raise ValueError(f"{file} {problem}; mend or remove it")
    return value  # type: ignore[no-any-return]


def parse_lines(
    file: Path, content: bytes, problem_of: Callable[[Any], str | None]
) -> list[dict[str, Any]]:
    """Return the objects in `content`, the lines of a .jsonl file without a torn last one.

    Args:
        file: named in errors.
        problem_of: returns what is wrong with a line, None if nothing is.

    Raises:
        ValueError: a line is damaged; file and line are named.
    """
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        if not text:
            continue
        line = _parsed(text)
        problem = problem_of(line)
        if problem:
            raise ValueError(f"{file}, line {number} {problem}; delete the line, the others stand")
        lines.append(line)
    return lines


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content
