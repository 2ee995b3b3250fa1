"""The environment of an attempt: code revision, package versions, hardware."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from typing_extensions import TypedDict

from runner.machine.typed_json import read_record

_CODE = Path(__file__).resolve().parents[2]
_SNAPSHOT_REVISION = _CODE / "revision.json"  # in a snapshot of the code, which is no clone
# A run computes the same bits only where these are equal; on a GPU it takes
# train.deterministic=true as well.
_DECIDES_BITS = (
    "cpu",
    "gpus",
    "device",
    "threads",
    "world",
    "parallel",
    "compile",
    "torch",
    "micro_batch",
    "backends",  # of GEMMs in low precision
)
_PACKAGES = ("torch", "numpy", "hydra-core", "mlflow", "tokenizers", "datasets", "triton")


class _Record(TypedDict, total=False):
    git_sha: str
    torch: str
    cpu: str
    gpus: list[str]
    measure: list[str]


def describe() -> dict[str, Any]:
    """Return code revision and diff, package versions, host, CPU, GPUs and threads."""
    import torch  # noqa: PLC0415

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "code": str(_CODE),
        **(_snapshot_revision() or revision()),
        "python": platform.python_version(),
        "packages": versions(),
        "torch": torch.__version__,
        "host": platform.node(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
    }


@lru_cache
def _sha() -> str:
    return git("rev-parse", "HEAD")


def _snapshot_revision() -> dict[str, str] | None:
    if not _SNAPSHOT_REVISION.exists():
        return None
    return read_record(_SNAPSHOT_REVISION, dict[str, str])


@lru_cache
def revision() -> dict[str, str]:
    """Return the commit of this clone and the diff of its working tree against it."""
    return {"git_sha": _sha(), "git_diff": git("diff", "HEAD")}


def first_record(run: Path) -> dict[str, Any]:
    """Return the environment that the first attempt of `run` recorded, {} before any attempt."""
    files = _records(run)
    return read_record(files[0], _Record) if files else {}


def changes(first: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the settings whose change makes a resume differ in bits from an uninterrupted run."""
    keys = [k for k in _DECIDES_BITS if k in first and first[k] != now.get(k)]
    return [f"{key}: {first[key]} at first, {now.get(key)} now" for key in keys]


def torch_drift(run: Path) -> str | None:
    """Return how the minor release of torch that `run` ended with differs from today's, or None."""
    then, now = str(last_record(run).get("torch", _torch_version())), _torch_version()
    return f"torch {then} then, {now} now" if then.split(".")[:2] != now.split(".")[:2] else None


def commit_drift(run: Path) -> str | None:
    """Return how the commit that `run` ended at differs from today's, None if it does not."""
    then, now = last_record(run).get("git_sha"), _sha()
    different = now and then not in (None, "", now)
    return f"commit {then[:9]} then, {now[:9]} now" if different and then else None


def last_record(run: Path) -> dict[str, Any]:
    """Return the environment that the last attempt of `run` recorded, {} before any attempt."""
    files = _records(run)
    return read_record(files[-1], _Record) if files else {}


@lru_cache
def _torch_version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("torch")
    return ""


def _records(run: Path) -> list[Path]:
    return sorted(run.glob("attempts/*/environment.json"))


@lru_cache
def own_version() -> str:
    """Return the installed version of espalier, "unknown" where only its files lie."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("espalier")
    return "unknown"


@lru_cache
def versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a result."""
    installed = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def git(*arguments: str) -> str:
    """Return the output of a git command on this code, "" where it is no clone."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=_CODE, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


@lru_cache
def cpu_name() -> str:
    """Return the model of this machine's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
