"""Where and with what an attempt ran: git state, packages, hardware."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "numpy", "hydra-core", "mlflow", "tokenizers", "datasets", "triton")


def describe() -> dict[str, Any]:
    """Return what may explain a difference between two attempts; the git diff is kept whole."""
    import torch  # noqa: PLC0415

    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "git_sha": git("rev-parse", "HEAD"),
        "git_diff": git("diff", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: versions[name] for name in _PACKAGES if name in versions},
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
    }


def git(*arguments: str) -> str:
    """Return git's answer about this clone, "" where it is none."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
