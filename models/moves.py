"""Where config classes lay before: the import path of first use -> the path of today.

Applied where a path is read (a `_target_`, a `!function` of a benchmark), and inverted where a
fingerprint is taken, so that a run keeps its name when code moves. Entries stay for ever; what moves
again changes its right side only.
"""

MOVED: dict[str, str] = {}


def today(path: str) -> str:
    """Return where the class or function lies now that `path` has named at any time."""
    return MOVED.get(path, path)


def released(path: str) -> str:
    """Return the path under which the class or function at `path` was first used."""
    return next((old for old, new in MOVED.items() if new == path), path)


def as_released(text: str) -> str:
    """Return `text` with every moved path as it was first used."""
    for old, new in MOVED.items():
        text = text.replace(new, old)
    return text
