"""Folders of sweeps and runs, whose names come from users and from files."""

import unicodedata
from pathlib import Path

from runner.machine.errors import ConfigError

_LONGEST = 200  # bytes: files are named NAME-..., and a file name holds 255


def check_name(key: str, name: str) -> str:
    """Return `name`, the value of `key`, which is to be a folder's or a file's name.

    Raises:
        ConfigError: it cannot be one, or would lead out of its folder.
    """
    odd = [c for c in name if c == "/" or unicodedata.category(c) in ("Cc", "Cs")]
    problem = None
    if not name.strip() or name.strip(".") == "":
        problem = "is no name of a folder"
    elif name.startswith("-"):
        problem = "begins with a dash, as options do"
    elif odd:
        problem = f"holds {odd[0]!a}, which no name of a folder can"
    elif len(name.encode()) > _LONGEST:
        problem = f"is longer than {_LONGEST} bytes"
    if problem:
        shown = name if len(name) <= _LONGEST else name[:40] + "..."
        raise ConfigError(f"{key}={shown!a} {problem}; give letters, digits, '-', '_' and '.'")
    return name


def sweep_folder(root: Path, name: str) -> Path:
    """Return the folder of the sweep `name` under `root`.

    Raises:
        ConfigError: `name` is no name of a folder.
    """
    return root / "sweeps" / check_name("name", name)


def run_folder(root: Path, fingerprint: str) -> Path:
    """Return the folder of the run with this fingerprint under `root`.

    Raises:
        ConfigError: `fingerprint` is no name of a folder.
    """
    return root / "runs" / check_name("run", fingerprint)
