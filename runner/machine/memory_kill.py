"""Signs that a process was killed for want of memory.

A SIGKILL alone is none: users, administrators and schedulers send it too. The kernel counts the
processes that it kills for memory by cgroup, else for the whole machine (/proc/vmstat).
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
# By version of cgroups: the file that counts the kernel's kills, the file of the limit in bytes.
_V2 = ("memory.events", "memory.max")
_V1 = ("memory.oom_control", "memory.limit_in_bytes")
_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_NEAR = 0.9  # the share of a limit at which a killed process counts as having reached it


class MemoryWatch:
    """Watches a process and its descendants, from its start to its end.

    Args:
        pid: the process; it may end at any time.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._groups = list(_groups(pid))
        # Of the last two samples: a dying process may be seen alive after the kernel has killed it.
        self._kills = [self._count_kills()] * 2
        self._used_bytes = 0

    def sample(self) -> None:
        """Note the memory in use and the kernel's kills so far; called every few seconds."""
        self._kills = [self._kills[1], self._count_kills()]
        with suppress(psutil.Error):
            process = psutil.Process(self._pid)
            parts = [p.memory_info() for p in (process, *process.children(recursive=True))]
            self._used_bytes = sum(m.rss - getattr(m, "shared", 0) for m in parts)

    def shortage(self) -> str | None:
        """Return the sign that the process, now dead, was killed for memory; None without one."""
        if self._count_kills() > self._kills[0]:
            return "the kernel killed it for want of memory"
        limits = [*self._limits_bytes(), psutil.virtual_memory().total]
        if self._used_bytes > _NEAR * min(limits):
            used_gb, limit_gb = self._used_bytes / 1e9, min(limits) / 1e9
            return f"it held {used_gb:.2f} GB of the {limit_gb:.2f} GB that it may have"
        return None

    def _count_kills(self) -> int:
        """Return how many processes of the cgroup, or of the machine, the kernel has killed."""
        for folder, (kills, _) in self._groups[:1]:
            match = _KILLS.search(_read(folder / kills))
            if match:
                return int(match[1])
        match = _KILLS.search(_read(Path("/proc/vmstat")))
        return int(match[1]) if match else 0

    def _limits_bytes(self) -> Iterator[int]:
        """Yield the limits of the cgroup and those above it, and that of a SLURM job."""
        for folder, (_, limit) in self._groups:
            text = _read(folder / limit).strip()
            if text.isdigit():
                yield int(text)
        job_mb = os.environ.get("SLURM_MEM_PER_NODE", "")
        if job_mb.isdigit() and int(job_mb):  # 0: all that the node has
            yield int(job_mb) << 20


def _groups(pid: int) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Yield the cgroup of `pid` that counts its memory and those above it, with their files."""
    for line in _read(Path(f"/proc/{pid}/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        root, files = (_CGROUPS, _V2) if not controllers else (_CGROUPS / controllers, _V1)
        if controllers in ("", "memory"):
            inner = Path(path.lstrip("/"))
            for part in (inner, *inner.parents):
                if (root / part / files[0]).exists():
                    yield root / part, files


def _read(file: Path) -> str:
    """Return the text of one of the kernel's files, "" where there is none."""
    try:
        return file.read_text()
    except OSError:
        return ""
