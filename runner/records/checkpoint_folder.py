"""The checkpoint folders of a run: listing, checking and pruning them, without importing torch.

`runner/records/checkpoint.py` reads and writes what is in one.
"""

import hashlib
import shutil
import warnings
from pathlib import Path

from runner.machine.typed_json import read_record

UNFINISHED = ".partial-"  # begins the name of a checkpoint that is being written


def newest(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None if there is none; warn of damaged ones."""
    for path in listing(folder)[::-1]:
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(
            f"checkpoint {path} is damaged ({problem}); using an earlier one", stacklevel=2
        )
    return None


def listing(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir())


def damage(path: Path) -> str | None:
    """Return the damage found by comparing files with their checksums, None if there is none."""
    try:
        sums = read_record(path / "manifest.json", dict[str, str])
        for name, expected in sums.items():
            if sha256(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def prune(folder: Path, *, keep_last: int, keep_every: int | None, best: int | None) -> None:
    """Delete all checkpoints but the last `keep_last`, those at multiples of `keep_every`, `best`.

    Args:
        keep_last: number of checkpoints; at least one stays.
        keep_every, best: steps; None keeps none for this reason.
    """
    for path in listing(folder)[: -max(1, keep_last)]:
        step = int(path.name)
        if step != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)


def delete_unfinished(folder: Path) -> None:
    """Delete what killed writers left; called by the holder of the lease, before it writes."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
