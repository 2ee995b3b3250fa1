"""A copy of the code for queued jobs, so that later edits do not change what they run.

snapshots/<hash>/ holds the files of our packages that git does not ignore, and revision.json: the
commit and the uncommitted changes.
"""

import hashlib
import json
import os
import shutil
import subprocess
from importlib.util import cache_from_source
from pathlib import Path

from runner.machine import storage
from runner.machine.environment import revision

_CLONE = Path(__file__).resolve().parents[2]
_PACKAGES = ("kernels", "models", "runner", "conf")


def snapshot(root: Path) -> Path:
    """Return the folder of a copy of the code under `root`, made unless it exists."""
    files = _files()
    digest = hashlib.sha256(revision()["git_sha"].encode())
    for file in files:
        digest.update(f"{file.relative_to(_CLONE)}\0".encode() + file.read_bytes())
    final = root / "snapshots" / digest.hexdigest()[:16]
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = storage.unfinished_name(final)
        partial.mkdir()
        for file in files:
            target = partial / file.relative_to(_CLONE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)  # with the rights that the umask leaves
            _copy_compiled(file, target)
        (partial / "revision.json").write_text(json.dumps(revision()))
        try:
            os.rename(partial, final)
        except OSError:  # another launch was faster
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _copy_compiled(file: Path, target: Path) -> None:
    """Copy what Python has compiled of `file`: to compile all takes each of the first jobs seconds.

    Python takes it for that of `target` as long as both sources have one time and size.
    """
    times = file.stat()
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    compiled, place = (Path(cache_from_source(f)) for f in (file, target))
    if file.suffix == ".py" and compiled.exists():
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(compiled, place)


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES],
        cwd=_CLONE,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        files = [_CLONE / name for name in listed.stdout.decode().split("\0") if name]
    else:  # not a clone: an unpacked archive
        files = [f for package in _PACKAGES for f in (_CLONE / package).rglob("*")]
    return sorted(f for f in files if f.is_file() and f.suffix != ".pyc")
