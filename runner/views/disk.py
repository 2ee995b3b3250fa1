"""Disk usage: the size of sweeps, what can be deleted, what may still be written."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runner.machine.errors import StorageError
from runner.records import checkpoint_folder, journal
from runner.records.cells import members
from runner.records.slurm_queue import queued


@dataclass(frozen=True)
class Waste:
    """A path that can be deleted, its size in bytes and the reason."""

    path: Path
    size: int
    reason: str

    def delete(self) -> None:
        """Delete the file or the folder."""
        shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()


def sweeps(root: Path) -> list[str]:
    """Return the names of all sweeps under `root`."""
    return sorted(file.parent.name for file in root.glob("sweeps/*/cells.jsonl"))


def size_bytes(path: Path) -> int:
    """Return the size in bytes of a file or of all files below a folder, without links."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.lstat().st_size for f in files if f.is_file() and not f.is_symlink())


def usage_bytes(root: Path, name: str) -> dict[str, int]:
    """Return the size in bytes of a sweep's run folders: of `checkpoints` and of all `other`."""
    folders = [root / "runs" / row["fingerprint"] for row in members(root, name)]
    saved = sum(size_bytes(f / "checkpoints") for f in folders)
    return {"checkpoints": saved, "other": sum(size_bytes(f) for f in folders) - saved}


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write below `path`: free space or quota.

    Quotas of the user and the user's groups are read by `quota` (local and NFS disks) and
    `lfs quota` (Lustre), if these commands are installed and answer.
    """
    path = path.resolve()
    while not path.exists():
        path = path.parent
    mount = next(p for p in (path, *path.parents) if p.is_mount())
    left = [shutil.disk_usage(path).free]
    quota = ["quota", "-u", "-g", "-w", "-p", "--show-mntpoint", "--hide-device", "-f", str(mount)]
    lustre = [["lfs", "quota", "-q", kind, name, str(mount)] for kind, name in _owners()]
    for command in (quota, *lustre):
        if shutil.which(command[0]):
            left += _left(command, mount)
    return max(0, min(left))


def _owners() -> list[tuple[str, str]]:
    return [("-u", str(os.getuid())), *(("-g", str(group)) for group in os.getgroups())]


def _left(command: list[str], mount: Path) -> Iterator[int]:
    """Yield the bytes that each quota on `mount` leaves, from the output of `command`.

    Its lines hold the mount, KiB used (with a * when over the limit), soft limit, hard limit.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    row = rf"^\s*{re.escape(str(mount))}\s+(\d+)\*?\s+(\d+)\*?\s+(\d+)"
    for used, soft, hard in re.findall(row, done.stdout, re.MULTILINE):
        limit = int(hard) or int(soft)
        if limit:
            yield (limit - int(used)) * 1024


def waste(root: Path, *, checkpoints: bool = False) -> Iterator[Waste]:
    """Yield what no sweep and no queued job needs.

    Args:
        checkpoints: also yield all but the newest checkpoint of finished and diverged runs.

    Raises:
        StorageError: SLURM does not answer, so it is unknown what queued jobs need.
    """
    names = sweeps(root)
    in_sweeps = {row["fingerprint"] for name in names for row in members(root, name)}
    for folder in sorted(root.glob("runs/*")):
        state = journal.state(folder)
        if folder.name not in in_sweeps and state != "running":
            yield Waste(folder, size_bytes(folder), f"a run of no sweep ({state})")
        elif checkpoints and state in journal.FINAL:
            newest = checkpoint_folder.newest(folder / "checkpoints")
            for saved in sorted(folder.glob("checkpoints/[0-9]*")):
                if saved != newest:
                    yield Waste(saved, size_bytes(saved), "an earlier checkpoint of an ended run")
    try:
        busy = any(queued(root, name) for name in names)
    except FileNotFoundError:  # this machine has no SLURM, or no longer
        busy = False
    except StorageError as error:
        raise StorageError(f"{error}: snapshots may be in use") from error
    running = any(journal.state(f) == "running" for f in root.glob("runs/*"))
    if not busy and not running:
        for folder in sorted(root.glob("snapshots/*")):
            yield Waste(folder, size_bytes(folder), "code of jobs that have ended")
    for folder in sorted(root.glob("runs/*")):
        if journal.state(folder) != "running":
            for partial in sorted((*folder.glob(".*-*"), *folder.glob("checkpoints/.*"))):
                yield Waste(partial, size_bytes(partial), "half written")
