"""Overrides as text: their keys and their order."""

from collections.abc import Iterable


def key_of(override: str) -> str:
    """Return the key of `key=value`, `+key=value`, `++key=value` or `~key`."""
    return override.lstrip("+~").partition("=")[0]


def wholes_first(overrides: Iterable[str]) -> list[str]:
    """Return the overrides with a whole node or list before the keys within it, so that both hold.

    `data.sources=[...]` comes before `data.sources.0.weight=2`; the order of others, of deletions
    and of choices of groups stays.
    """
    ordered: list[str] = []
    for override in overrides:
        whole = f"{key_of(override)}."
        within = [i for i, other in enumerate(ordered) if key_of(other).startswith(whole)]
        if override.startswith("~"):
            within = []
        ordered.insert(within[0] if within and whole.count(".") > 1 else len(ordered), override)
    return ordered
