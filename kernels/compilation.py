"""The compiler of the references that run on a CPU, handed in from outside.

A compiler keeps libraries in files, and these functions touch none: `models/compiled_kernels.py`
does and hands itself in by `use_compiler`. Until then the eager references run, many times slower.
"""

from collections.abc import Callable

from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Sizes = tuple[dict[int, str], ...]
# (function, its name, example tensors, free sizes) -> a function that gives the same bits. The name
# tells a function, with all that is bound to it, from every other one. Examples have the right
# dtypes and small sizes. Sizes are for each tensor {dim: "16*r"}: a multiple of 16 that is called
# r.
Compiler = Callable[[Function, str, tuple[Tensor, ...], Sizes], Function]


def eager(function: Function, name: str, example: tuple[Tensor, ...], sizes: Sizes) -> Function:
    """Return `function` itself: the compiler that compiles nothing."""
    return function


_compiler: Compiler = eager


def use_compiler(compiler: Compiler) -> None:
    """Compile the references by `compiler` from now on, each when it is first called."""
    global _compiler
    _compiler = compiler


def current_compiler() -> Compiler:
    """Return the compiler handed in last, `eager` where there is none."""
    return _compiler
