"""Shapes are checked where a function names any; other functions are checked by type alone.

jaxtyping binds the arguments of whatever its import hook reaches, which takes longer than most
functions that have no shape to check, and a third of the time of the tests.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping

_check_shapes = jaxtyping.jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Callable[[Any], Any] | None) -> Any:
    """Decorate as `jaxtyping.jaxtyped`, in whose place the import hook finds it."""
    if fn is None:
        return lambda fn: jaxtyped(fn, typechecker=typechecker)
    if typechecker is not None and inspect.isfunction(fn) and not _needs_jaxtyping(fn):
        return typechecker(fn)
    return _check_shapes(fn, typechecker=typechecker)


def _needs_jaxtyping(fn: Callable[..., Any]) -> bool:
    """Return whether a function names a shape, or a class that only a type checker imports."""
    hints = fn.__annotations__
    return "[Tensor" in str(hints) or any(isinstance(hint, str) for hint in hints.values())


def install() -> None:
    """Let the import hook decorate with `jaxtyped` what it imports from now on."""
    jaxtyping.jaxtyped = jaxtyped
