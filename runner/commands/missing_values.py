"""Values that a YAML node leaves to the user: `???`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from runner.machine.errors import ConfigError


def refuse_missing_values(node: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Refuse a composed `node` in which a value is `???`.

    Args:
        choices: the name chosen in each group, for the message.

    Raises:
        ConfigError: a value is missing; the message gives all their keys.
    """
    missing = list(_missing(node))
    if not missing:
        return
    groups = dict.fromkeys(key.partition(".")[0] for key in missing)
    chosen = " and ".join(f"{group}={choices[group]}" for group in groups if group in choices)
    raise ConfigError(
        f"{' and '.join(missing)} must be given{f' with {chosen}' if chosen else ''}; "
        f"add {' '.join(f'{key}=VALUE' for key in missing)}"
    )


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of each value that is `???`."""
    if node == "???":
        yield path
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    for key, value in items:
        yield from _missing(value, f"{path}.{key}".removeprefix("."))
