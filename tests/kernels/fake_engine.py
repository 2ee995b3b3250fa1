"""TransformerEngine's PyTorch API on a CPU, with its rules; the products are our references'.

The rules are those of TransformerEngine 2.20's own Python code: a recipe holds inside `autocast`
only, an operand is quantised as it comes (no cast), a Hadamard transform takes bf16 alone, and the
scales of DelayedScaling change at the end of the outermost `autocast`, so that a repeated forward
pass must be told of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gemm_recipes import GemmRecipe, LinearRecipe
from kernels.native import published
from kernels.operands import Delayed
from kernels.philox import Dice, NoiseKey
from kernels.quantised_linear import quantised_linear

_IN_FORWARD, _IN_BACKWARD = [0, 1], [2, 3, 4, 5]  # of kernels.quantised_linear.OPERANDS


def _ours(recipe: Any) -> LinearRecipe:
    for name, arguments, ours in published():
        same = name == type(recipe).__name__ and all(
            getattr(getattr(recipe, key), "name", getattr(recipe, key)) == value
            for key, value in arguments.items()
        )
        if same and recipe.backward_override is None:
            return ours
        if same:
            backward = GemmRecipe(dequantised=recipe.backward_override == "dequantized")
            return replace(ours, dgrad=backward, wgrad=backward)
    raise AssertionError(f"no recipe of ours is {recipe}")


class FakeEngine:
    """What `kernels.native` uses of transformer_engine.pytorch; `calls` logs each linear's pass.

    Args:
        broken: the message of the error that every product raises.
    """

    def __init__(self, broken: str | None = None) -> None:
        self.broken, self.calls = broken, list[tuple[str, bool]]()
        self._recipe: Any = None
        self._linears: list[Any] = []
        self._region = self._again = False
        self.distributed = SimpleNamespace(
            get_activation_recompute_contexts=lambda: (
                self._recomputing(again=False),
                self._recomputing(again=True),
            )
        )

    @contextmanager
    def autocast(self, *, enabled: bool, recipe: Any) -> Iterator[None]:
        """Compute in `recipe` inside."""
        before, self._recipe = self._recipe, recipe if enabled else None
        if not self._again:
            self._rescale(_IN_BACKWARD)
        yield
        self._recipe = before
        if before is None and torch.is_grad_enabled():
            self._rescale(_IN_FORWARD)

    def _rescale(self, operands: list[int]) -> None:
        for linear in self._linears:
            linear.delayed.amax[operands] = linear.delayed.seen[operands]

    @contextmanager
    def _recomputing(self, *, again: bool) -> Iterator[None]:
        self._region, self._again = True, again
        yield
        self._region = self._again = False

    def Linear(self, in_features: int, out_features: int, **_: Any) -> nn.Module:
        """Return a linear layer of this engine."""
        linear = _Linear(self)
        self._linears.append(linear)
        return linear


class _Linear(nn.Module):
    def __init__(self, engine: FakeEngine) -> None:
        super().__init__()
        self.engine, self.kept = engine, list[Tensor]()
        self.delayed = Delayed(torch.zeros(6), torch.zeros(6))

    def get_extra_state(self) -> Tensor:
        """Return the scales, as the engine's linear does."""
        return self.delayed.amax

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T in the engine's recipe of the moment, in bf16 without one."""
        engine, recipe = self.engine, self.engine._recipe
        if engine.broken:
            raise RuntimeError(engine.broken)
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        engine.calls.append((type(recipe).__name__, engine._again))
        if recipe is None:
            return F.linear(x.bfloat16(), weight.bfloat16())
        turned = not getattr(recipe, "disable_rht", True)
        if turned and x.dtype != torch.bfloat16:
            raise RuntimeError("RHT is only supported for bfloat16 input")
        amax = self.delayed.amax.clone()
        if engine._again:
            amax = self.kept.pop(0)
        elif engine._region:
            self.kept.append(amax)
        scales = Delayed(amax, self.delayed.seen)
        dice = Dice.of(NoiseKey(seed=0, step=0, samples=torch.arange(1)))  # in training
        return quantised_linear(x, weight, _ours(recipe), layer=0, dice=dice, delayed=scales)
