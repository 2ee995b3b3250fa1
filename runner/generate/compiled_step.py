"""A model's decoding steps compiled, once for all batches of it.

`torch.compile` keeps its graphs by code, so that before each call it looks at every weight and
every attribute of the model, in case it is another one: a twentieth of a step of a small model.
Here the graphs are the model's own, and it is looked at when a batch begins.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from models.contract import Pass, read_side_by_side

# Without Inductor's checks of its own tensors, of which a step makes a hundred.
_UNCHECKED: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}
_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # torch 2.13
_Steps = tuple[Callable[..., Any], Callable[..., Any]]
_steps: "WeakKeyDictionary[nn.Module, tuple[object, _Steps]]" = WeakKeyDictionary()


class CompiledStep:
    """A model whose forward is compiled, and `read_side_by_side` of it.

    It takes the model's place in `models.contract.read`. From here on weights may change their
    values, and nothing else of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._orig_mod = model  # as torch.compile names it
        now = _structure(model)
        known, steps = _steps.get(model, (None, None))
        if steps is None or known != now:
            steps = _compile(_forward), _compile(read_side_by_side)
            _steps[model] = now, steps
        self._step, self._together = steps

    def __call__(self, *args: Any, **given: Any) -> Any:
        """Return what the model's forward does."""
        return self._step(self._orig_mod, *args, **given)

    def read_side_by_side(self, passes: Sequence[Pass]) -> list[Tensor]:
        """See `models.contract.read_side_by_side`."""
        logits: list[Tensor] = self._together(self._orig_mod, passes)
        return logits


def _structure(model: nn.Module) -> object:
    """Return what graphs of a model depend on, but for attributes that never change."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors]


def _forward(model: nn.Module, *args: Any, **given: Any) -> Any:
    return model(*args, **given)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    options, isolated = dict(_UNCHECKED), dict[str, Any]()
    if _CAN_ISOLATE:
        options["guard_filter_fn"] = _guards_of_arguments
        isolated["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(
        function, dynamic=False, options=options, **isolated
    )
    return compiled


def _guards_of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Return which guards to keep: those neither of modules nor of globals."""
    without_modules: Any = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    without_globals: Any = torch.compiler.skip_guard_on_globals_unsafe
    kept = zip(without_modules(guards), without_globals(guards), strict=True)
    return [all(both) for both in kept]
