"""A sandbox for programs written by a model: no network, a temporary file system, resource limits.

It uses bubblewrap, or else user namespaces. Where neither works programs are refused unless the
user allows them. The memory limit holds for each process by itself, and root is exempt from the
limit on processes; the time limit ends all processes of a program.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from runner.machine.errors import ConfigError

Wall = Literal["bubblewrap", "namespaces", "none"]

_SYSTEM = [d for d in ("/usr", "/lib", "/lib64", "/bin") if Path(d).exists()]
# Its own root: read-only mounts of what Python needs, /proc, a small /tmp; then all rights go.
_ENTER = """
set -e
mount -t tmpfs -o size=64m,mode=755 none /mnt
cd /mnt
for folder in {folders}; do
    if [ -L $folder ]; then ln -s "$(readlink $folder)" .$folder; continue; fi
    mkdir -p .$folder
    mount --bind $folder .$folder
    mount -o remount,bind,ro,nosuid,nodev .$folder
done
mkdir proc dev tmp
mount -t proc proc proc
for device in null zero urandom; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mount -t tmpfs -o size=64m none tmp
mount -o remount,ro .
pivot_root . .
umount -l .
cd /tmp
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Args:
        wall_s: seconds of wall time.
        memory_bytes: of address space, for each process.
        file_bytes: of each file written.
        files: open files.
        processes: of the user.
    """

    wall_s: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 24
    files: int = 64
    processes: int = 32


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed, and if not the reason: the end of its stderr, or the timeout."""

    passed: bool
    reason: str


def choose_wall(allow_unsafe: bool) -> Wall:
    """Return the sandbox to run programs in, "none" only if `allow_unsafe` and none works here.

    Raises:
        ConfigError: neither bubblewrap nor user namespaces work here, and `allow_unsafe` is False.
    """
    for wall in ("bubblewrap", "namespaces"):
        if _works(wall):
            return wall
    if allow_unsafe:
        return "none"
    raise ConfigError(
        "programs of a model need a sandbox, and neither bubblewrap (apt-get install bubblewrap) "
        "nor user namespaces (sysctl kernel.unprivileged_userns_clone) work here; leave the code "
        "tasks out, or accept the risk with eval.harness.allow_unsafe_code=true"
    )


@lru_cache
def _works(wall: Wall) -> bool:
    needed = {
        "bubblewrap": ["bwrap"],
        "namespaces": ["unshare", "setpriv", "pivot_root"],
        "none": [],
    }
    if not all(shutil.which(name) for name in [*needed[wall], "prlimit"]):
        return False
    return run("pass", wall=wall).passed


def run(program: str, *, wall: Wall, limits: Limits | None = None) -> Outcome:
    """Run a Python program and return its outcome; it passes by reaching its last line."""
    limits = limits or Limits()
    token = secrets.token_hex(16)  # printed at the end: an early sys.exit(0) does not pass
    text = f"{program}\nprint({token!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        out, err, source = (Path(folder) / name for name in ("out", "err", "program.py"))
        source.write_text(text, encoding="utf-8")
        with source.open("rb") as stdin, out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                _command(wall, limits),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                code = process.wait(limits.wall_s)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"timed out after {limits.wall_s:g} s")
            finally:  # its children too
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        passed = code == 0 and _tail(out).rstrip().endswith(token)
        return Outcome(passed, "" if passed else _tail(err).strip() or f"exit code {code}")


def _tail(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 2000))
        return stream.read().decode(errors="replace")


def _command(wall: Wall, limits: Limits) -> list[str]:
    python = [os.path.realpath(sys.executable), "-I", "-S", "-"]
    limited = [
        str(shutil.which("prlimit")),
        f"--as={limits.memory_bytes}",
        f"--fsize={limits.file_bytes}",
        f"--nofile={limits.files}",
        f"--nproc={limits.processes}",
        f"--cpu={int(limits.wall_s) + 1}",
        "--core=0",
        *python,
    ]
    folders = [*_SYSTEM, sys.base_prefix] if sys.base_prefix != "/usr" else _SYSTEM
    if wall == "bubblewrap":
        views = [part for f in folders for part in ("--ro-bind", f, f)]
        isolation = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        mounts = ["--proc", "/proc", "--dev", "/dev", "--size", str(1 << 26), "--tmpfs", "/tmp"]
        start = ["--chdir", "/tmp", "--remount-ro", "/"]
        return [str(shutil.which("bwrap")), *isolation, *views, *mounts, *start, *limited]
    if wall == "namespaces":
        script = "PATH=/usr/bin:/usr/sbin:/bin:/sbin" + _ENTER.format(folders=" ".join(folders))
        namespaces = ["--user", "--map-root-user", "--net", "--pid", "--mount", "--ipc", "--uts"]
        start = ["--fork", "--kill-child", "/bin/sh", "-c", script, "sandbox"]
        return [str(shutil.which("unshare")), *namespaces, *start, *limited]
    return limited
