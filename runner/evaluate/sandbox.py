"""A sandbox for programs written by a model: no network, a temporary file system, resource limits.

It uses bubblewrap, or else user namespaces. Where neither works programs are refused unless the
user allows them. Root is exempt from the limit on processes; the limits on time and on memory in
all end all processes of a program, memory being looked at ten times a second.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil

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
mkdir proc dev dev/shm tmp
mount -t proc proc proc
for device in null zero urandom; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mount -t tmpfs -o size=64m none tmp
mount -t tmpfs -o size=64m none dev/shm
mount -o remount,ro .
pivot_root . .
umount -l .
cd /tmp
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""
# What Python runs: the program, from its stdin as __main__, then its token goes to a file of its
# own, whatever has become of stdout. A child that the program forks does not reach the end for it.
_RUN = """
def run():
    import os, sys
    end, pid = int(sys.argv.pop()), os.getpid()
    token, _, source = sys.stdin.buffer.read().partition(b"\\n")
    names = sys.modules["__main__"].__dict__
    del names["run"]
    exec(compile(source, "<program>", "exec", dont_inherit=True), names)
    if os.getpid() == pid:
        os.write(end, token)
run()
"""
_NOT_FLUSHED = 120  # exit code of Python if stdout was closed underneath it
_LOOK_S = 0.1


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Args:
        wall_s: seconds of wall time.
        memory_bytes: of address space, for each process.
        total_memory_bytes: resident, of all processes together; what they share counts once.
        file_bytes: of each file written.
        files: open files.
        processes: of the user.
    """

    wall_s: float = 10.0
    memory_bytes: int = 1 << 30
    total_memory_bytes: int = 1 << 30
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
    token = secrets.token_hex(16)  # written at the end: an early sys.exit(0) does not pass
    with tempfile.TemporaryDirectory() as folder:
        out, err, source, end = (Path(folder) / name for name in ("out", "err", "program", "end"))
        source.write_text(f"{token}\n{program}", encoding="utf-8", errors="surrogatepass")
        with (
            source.open("rb") as stdin,
            out.open("wb") as stdout,
            err.open("wb") as stderr,
            end.open("wb") as reached,
        ):
            process = subprocess.Popen(
                [*_command(wall, limits), str(reached.fileno())],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[reached.fileno()],
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                code, broken = _wait(process, limits)
            finally:  # its children too
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if broken:
            return Outcome(False, broken)
        passed = code in (0, _NOT_FLUSHED) and _tail(end) == token
        return Outcome(passed, "" if passed else _tail(err).strip() or f"exit code {code}")


def _wait(process: subprocess.Popen[bytes], limits: Limits) -> tuple[int, str]:
    """Return (exit code, "") of a program that ends, (0, why) of one that breaks a limit."""
    deadline = time.monotonic() + limits.wall_s
    while True:
        try:
            return process.wait(max(0.0, min(_LOOK_S, deadline - time.monotonic()))), ""
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                return 0, f"timed out after {limits.wall_s:g} s"
            if _resident_bytes(process.pid) > limits.total_memory_bytes:
                return 0, f"took more than {limits.total_memory_bytes / 1e6:.0f} MB of memory"


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and all below it, shared pages counted once."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return sum(_bytes_of(process) for process in (first, *first.children(recursive=True)))
    return 0


def _bytes_of(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        try:
            return int(process.memory_full_info().pss)
        except psutil.AccessDenied:
            return int(process.memory_info().rss)
    return 0


def _tail(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 2000))
        return stream.read().decode(errors="replace")


def _command(wall: Wall, limits: Limits) -> list[str]:
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c", _RUN]
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
        mounts = ["--proc", "/proc", "--dev", "/dev"]
        for folder in ("/tmp", "/dev/shm"):
            mounts += ["--size", str(1 << 26), "--tmpfs", folder]
        start = ["--chdir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]
        return [str(shutil.which("bwrap")), *isolation, *views, *mounts, *start, *limited]
    if wall == "namespaces":
        script = "PATH=/usr/bin:/usr/sbin:/bin:/sbin" + _ENTER.format(folders=" ".join(folders))
        namespaces = ["--user", "--map-root-user", "--net", "--pid", "--mount", "--ipc", "--uts"]
        start = ["--fork", "--kill-child", "/bin/sh", "-c", script, "sandbox"]
        return [str(shutil.which("unshare")), *namespaces, *start, *limited]
    return limited
