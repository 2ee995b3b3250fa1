"""The references of `kernels` compiled ahead of time for this CPU: a load takes 2 ms.

`torch.compile` would trace and guard in every process, and a grid of small cells has thousands of
processes. Here a function is exported with free sizes, compiled by Inductor to a shared library and
stored in the temporary folder; later processes load it. Results equal the eager function's bit for
bit (tests hold every variant to that).
"""

import fcntl
import hashlib
import os
import platform
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels.compilation import Function, Sizes, eager, use_compiler

_LARGEST = 1 << 20  # beyond any number of rows or columns
_OPTIONS = {
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
    # Inductor 2.13 puts pointwise work on a scalar into the parallel region, where every thread
    # does it: in place, two threads may apply it twice.
    "inplace_buffers": False,
}
_EAGER = "ESPALIER_EAGER_KERNELS"  # set: use the eager references


def compile_kernels() -> None:
    """Let `kernels` compile its references for this CPU.

    The environment variable ESPALIER_EAGER_KERNELS keeps them eager.
    """
    use_compiler(eager if os.environ.get(_EAGER) else compile_for_cpu)


def compile_for_cpu(
    function: Function, name: str, example: tuple[Tensor, ...], sizes: Sizes
) -> Function:
    """Return `function` compiled for this CPU; if that fails, warn and return `function` itself.

    For the arguments see `kernels.compilation.Compiler`.
    """
    try:
        library = _library(function, name, example, sizes)
        return torch._inductor.aoti_load_package(str(library))  # type: ignore[no-any-return]
    except Exception as error:
        warnings.warn(f"{name} runs uncompiled, many times slower: {error}", stacklevel=2)
        return function


def _library(function: Function, name: str, example: tuple[Tensor, ...], sizes: Sizes) -> Path:
    folder = Path(tempfile.gettempdir()) / f"espalier-kernels-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    file = folder / f"{name}-{_environment()}.pt2"
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of many cells that start together one compiles
        if not file.exists():
            partial = file.with_name(f"{os.getpid()}-{file.name}")
            _build(function, example, sizes, partial)
            partial.rename(file)
    return file


def _build(function: Function, example: tuple[Tensor, ...], sizes: Sizes, file: Path) -> None:
    symbols: dict[str, Any] = {}

    def dimension(size: str) -> Any:
        factor, _, symbol = size.rpartition("*")
        root = symbols.setdefault(symbol, torch.export.Dim(symbol, min=1, max=_LARGEST))
        return int(factor) * root if factor else root

    shapes = tuple({dim: dimension(size) for dim, size in free.items()} for free in sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Program(function), example, dynamic_shapes=(shapes,))
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(file), inductor_configs=_OPTIONS
        )


@lru_cache
def _environment() -> str:
    """Return a digest of all that a library depends on: torch, the CPU and the source code."""
    names = ("double_scales", "emulate", "formats", "philox", "quantise", "quantiser")
    sources = [Path(__file__), *(Path(kernels.__path__[0]) / f"{name}.py" for name in names)]
    parts = [torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu()]
    return hashlib.sha256(
        b"\0".join([*map(str.encode, parts), *(f.read_bytes() for f in sources)])
    ).hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), "")


class _Program(nn.Module):
    """A function as the module that torch.export takes."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(*tensors)
