"""A linear layer under a recipe: what `Precision.prepare` puts in the place of `nn.Linear`."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.philox import Dice
from kernels.quantised_linear import OPERANDS, Delayed, LinearRecipe, Probe, quantised_linear
from models.precision_config import LinearConfig
from models.recipes import linear_recipe, operand_recipe


@dataclass
class Shared:
    """What the quantised layers of a model have in common: a recipe's `Precision` sets it, they read it.

    Args:
        device: that they compute on; check_finite: look for NaN and inf in every operand.
        dice: where random bits of this forward pass come from (None: no stochastic rounding).
        probing: keep statistics of the operands in this step.
    """

    device: torch.device
    check_finite: bool
    dice: Dice | None = None
    probing: bool = False


class QuantisedLinear(nn.Linear):
    """A linear whose GEMMs follow a recipe; it has the parameters of the one that it replaces."""

    def __init__(
        self, linear: nn.Linear, chosen: LinearConfig, shared: Shared, index: int, name: str
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.chosen, self.index, self.name = chosen, index, name
        self.probe: Probe = {}
        self.shared = shared
        self._recipes: dict[tuple[bool, bool], LinearRecipe] = {}
        self.missing = {"k": 0, "n": 0}
        self.native: list[nn.Module] = []  # TransformerEngine's, no submodule: the weight is ours
        self.delayed: Delayed | None = None
        if any(how.scale == "delayed" for how in chosen.operands().values()):
            device = shared.device
            self.delayed = Delayed(*(torch.zeros(len(OPERANDS), device=device) for _ in range(2)))
        self.select(forward=True, backward=True)

    def select(self, *, forward: bool, backward: bool) -> None:
        """Choose which GEMMs are quantised from now on."""
        key = (forward, backward)
        if key not in self._recipes:
            self._recipes[key] = linear_recipe(self.chosen, forward=forward, backward=backward)
        self.recipe = self._recipes[key]

    def go_native(self) -> str | None:
        """Compute with TransformerEngine from now on; return why not where the layer does not allow it."""
        if any(self.missing.values()):
            return "its width is filled up"
        odd = [size for size in (self.in_features, self.out_features) if size % 16]
        if odd:
            return f"width {odd[0]} is not a multiple of 16"
        self.native = [native.native_linear(self.in_features, self.out_features)]
        self.delayed = None
        return None

    def fit(self, *, pad: bool) -> None:
        """Check widths against blocks and Hadamard groups, all powers of two or multiples of each other.

        Raises:
            ValueError: one does not fit and `pad` is not set.
        """
        sizes = {"k": self.in_features, "n": self.out_features}
        for what, letter, part in self._parts():
            missing = -sizes[letter] % part
            if missing and not pad:
                raise ValueError(
                    f"{self.name}: {letter}={sizes[letter]} is not a multiple of {part} ({what}); change the "
                    f"width or the block, set precision.pad=true, or precision.keep=['{self.name}']"
                )
            self.missing[letter] = max(self.missing[letter], missing)

    def _parts(self) -> Iterator[tuple[str, str, int]]:
        summed = {"fprop": "k", "dgrad": "n"}
        for operand, how in self.chosen.operands().items():
            gemm, _, letter = operand.partition(".")
            recipe = operand_recipe(how)
            if recipe is None:
                continue
            across, along = (max(1, size) for size in recipe.quantiser.block)
            if gemm in summed:
                yield f"the block of {operand}", summed[gemm], along
            if letter == "w":
                yield f"the block of {operand}", "n" if gemm == "fprop" else "k", across
            if gemm == "wgrad":
                yield f"the block of {operand}", "n" if letter == "g" else "k", across
        for gemm, letter in summed.items():
            if getattr(self.chosen, gemm).hadamard:
                yield f"hadamard of {gemm}", letter, getattr(self.chosen, gemm).hadamard

    def forward(self, input: Tensor) -> Tensor:
        """Return input W^T + b."""
        shared = self.shared
        if shared.check_finite:
            self._check(input, "input")
            self._check(self.weight, "weight")
        if self.native:
            y = native.apply(self.native[0], input, self.weight)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        dice = shared.dice if torch.is_grad_enabled() else None
        weight, (k, n) = self.weight, self.missing.values()
        if k or n:
            input, weight = F.pad(input, (0, k)), F.pad(weight, (0, k, 0, n))
        y = quantised_linear(
            input,
            weight,
            self.recipe,
            layer=self.index,
            dice=dice,
            delayed=self.delayed,
            probe=self.probe if shared.probing and dice is not None else None,
        )
        y = y[..., : self.out_features] if n else y
        if shared.check_finite and y.requires_grad:
            y.register_hook(lambda grad: self._check(grad, "gradient"))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _check(self, tensor: Tensor, what: str) -> None:
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"precision.check_finite: the {what} of {self.name} has NaN or inf")
