"""What lies on the disk and what of it nobody needs any more."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner import checkpoint, journal
from runner.errors import StorageError
from runner.sweep.cells import members
from runner.sweep.queue import queued


@dataclass(frozen=True)
class Waste:
    """A path that can go, its size in bytes and why."""

    path: Path
    size: int
    reason: str

    def delete(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()


def sweeps(root: Path) -> list[str]:
    """Return the names of all sweeps under `root`."""
    return sorted(file.parent.name for file in root.glob("sweeps/*/cells.jsonl"))


def size(path: Path) -> int:
    """Return the bytes of a file or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.lstat().st_size for f in files if f.is_file() and not f.is_symlink())


def usage(root: Path, name: str) -> dict[str, int]:
    """Return the bytes of a sweep: its checkpoints and all else in its run folders."""
    folders = [root / "runs" / row["fingerprint"] for row in members(root, name)]
    saved = sum(size(f / "checkpoints") for f in folders)
    return {"checkpoints": saved, "other": sum(size(f) for f in folders) - saved}


def waste(root: Path, *, checkpoints: bool = False) -> Iterator[Waste]:
    """Yield what no sweep and no queued job needs.

    Args:
        checkpoints: also all but the newest checkpoint of finished and diverged runs.

    Raises:
        StorageError: jobs may be queued but SLURM does not answer, so nobody knows what they need.
    """
    names = sweeps(root)
    kept = {row["fingerprint"] for name in names for row in members(root, name)}
    for folder in sorted(root.glob("runs/*")):
        state = journal.state(folder)
        if folder.name not in kept and state != "running":
            yield Waste(folder, size(folder), f"a run of no sweep ({state})")
        elif checkpoints and state in ("finished", "diverged"):
            newest = checkpoint.newest(folder / "checkpoints")
            for saved in sorted(folder.glob("checkpoints/[0-9]*")):
                if saved != newest:
                    yield Waste(saved, size(saved), "an earlier checkpoint of an ended run")
    try:
        busy = any(queued(root, name) for name in names)
    except FileNotFoundError:  # no SLURM on this machine, or no longer
        busy = False
    except StorageError as error:
        raise StorageError(f"{error}: snapshots may be in use") from error
    running = any(journal.state(f) == "running" for f in root.glob("runs/*"))
    if not busy and not running:
        for folder in sorted(root.glob("snapshots/*")):
            yield Waste(folder, size(folder), "code of jobs that have ended")
    for folder in sorted(root.glob("runs/*")):
        if journal.state(folder) != "running":
            for partial in sorted((*folder.glob(".*-*"), *folder.glob("checkpoints/.*"))):
                yield Waste(partial, size(partial), "half written")
