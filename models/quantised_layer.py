"""A linear layer under a recipe, which `Precision.prepare` puts in the place of nn.Linear."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.emulate import Operand, emulate
from kernels.gemm_recipes import LinearRecipe
from kernels.operands import OPERANDS, Delayed, Probe
from kernels.outliers import Columns, in_fp8
from kernels.philox import Dice
from kernels.quantised_linear import quantised_linear, weight_operands
from kernels.tensor_cores import passed_over
from models.out_control_config import OutControlConfig
from models.precision_config import LinearConfig
from models.recipes import linear_recipe, operand_recipe


@dataclass
class Shared:
    """The state that all quantised layers of a model share; `Precision` sets it, they read it.

    Args:
        device: the device that they compute on.
        check_finite: stop at NaN or inf in an operand.
        dice: source of the random bits of this forward pass (None: no stochastic rounding).
        probing: record statistics of the operands in this step.
    """

    device: torch.device
    check_finite: bool
    dice: Dice | None = None
    probing: bool = False


class QuantisedLinear(nn.Linear):
    """A linear layer whose GEMMs follow a recipe.

    Its weight and bias are the parameters of the nn.Linear that it replaces.
    """

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
        self.padding = {"k": 0, "n": 0}  # columns and rows of zeros
        self.native: list[nn.Module] = []  # TransformerEngine's, no submodule: the weight is ours
        self.kept: tuple[Operand, Operand] | None = None  # the weight's while it stays as it is
        self.squares: Tensor | None = None  # of each input channel in this step, while summed
        self.columns: Columns | None = None  # the input channels that are in FP8
        self.tensor_cores = False  # whether torch._scaled_mm multiplies
        self.delayed: Delayed | None = None
        if any(operand.scale == "delayed" for operand in chosen.operands().values()):
            amax, seen = (torch.zeros(len(OPERANDS), device=shared.device) for _ in range(2))
            self.delayed = Delayed(amax, seen)
        self.select(forward=True, backward=True)

    @property
    def width(self) -> int:
        """The number of input channels, padding included."""
        return self.in_features + self.padding["k"]

    def select(self, *, forward: bool, backward: bool) -> None:
        """Quantise the GEMMs of these directions from now on, the others not."""
        key = (forward, backward)
        if key not in self._recipes:
            self._recipes[key] = linear_recipe(self.chosen, forward=forward, backward=backward)
        self.recipe = self._recipes[key]

    def go_native(self) -> str | None:
        """Compute with TransformerEngine from now on; return None, or why the layer cannot."""
        if any(self.padding.values()):
            return "its width is filled up"
        for size in (self.in_features, self.out_features):
            if size % 16:
                return f"width {size} is not a multiple of 16"
        self.native = [native.native_linear(self.in_features, self.out_features)]
        self.delayed = None
        return None

    def go_tensor_cores(self, out_control: OutControlConfig | None) -> str | None:
        """Multiply by `torch._scaled_mm` from now on; return None, or why the layer cannot."""
        fprop = self.chosen.fprop
        if out_control is not None and out_control.takes(fprop.x, fprop.w):
            return "some of its channels are in FP8"
        if self.in_features % 16 or self.out_features % 16:
            return f"width {self.in_features} or {self.out_features} is not a multiple of 16"
        why = passed_over(linear_recipe(self.chosen), self.shared.device)
        self.tensor_cores = why is None
        return why

    def fit(self, *, pad: bool) -> None:
        """Check widths against blocks and Hadamard groups; with `pad` fill them up with zeros.

        Blocks and groups are powers of two or multiples of each other, so that the widest padding
        fits all.

        Raises:
            ValueError: a width is not a multiple and `pad` is False.
        """
        sizes = {"k": self.in_features, "n": self.out_features}
        for what, letter, divisor in self._divisors():
            missing = -sizes[letter] % divisor
            if missing and not pad:
                raise ValueError(
                    f"{self.name}: {letter}={sizes[letter]} is not a multiple of {divisor} "
                    f"({what}); change the width or the block, leave precision.pad to its default, "
                    f"or set precision.keep=['{self.name}']"
                )
            self.padding[letter] = max(self.padding[letter], missing)

    def cost_of_padding(self) -> str:
        """Return what the zeros of `fit` add to each GEMM, in words; "" if there are none."""
        k, n = self.in_features, self.out_features
        wide, tall = k + self.padding["k"], n + self.padding["n"]
        if (wide, tall) == (k, n):
            return ""
        return f"{n}x{k} padded to {tall}x{wide}, {wide * tall / (k * n) - 1:+.1%} FLOPs"

    def _divisors(self) -> Iterator[tuple[str, str, int]]:
        """Yield (reason, dimension, divisor of its size); dimensions as in `quantised_linear`."""
        summed = {"fprop": "k", "dgrad": "n"}
        for operand, cfg in self.chosen.operands().items():
            gemm, _, letter = operand.partition(".")
            recipe = operand_recipe(cfg, getattr(self.chosen, gemm).hadamard)
            if recipe is None:
                continue
            across, along = (max(1, size) for size in recipe.quantiser.span)
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
        """Return input @ weight.T + bias."""
        shared = self.shared
        if shared.check_finite:
            self._check(input, "input")
            self._check(self.weight, "weight")
        if self.native:
            y = native.apply(self.native[0], input, self.weight)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        dice = shared.dice if torch.is_grad_enabled() else None
        k, n = self.padding.values()
        input = F.pad(input, (0, k)) if k else input
        probe = self.probe if shared.probing and dice is not None else None
        if self.squares is not None and dice is not None:
            rows = input.detach().to(torch.bfloat16).flatten(0, -2)
            norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64)
            self.squares += norms.square()
        y = quantised_linear(
            input,
            self._filled_weight(),
            self.recipe,
            layer=self.index,
            dice=dice,
            delayed=self.delayed,
            probe=probe,
            tensor_cores=self.tensor_cores,
            kept=None if dice is None or probe is not None else self.kept,
            columns=self.columns,
        )
        y = y[..., : self.out_features] if n else y
        if shared.check_finite and y.requires_grad:
            y.register_hook(lambda grad: self._check(grad, "gradient"))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def quantised_weight(self, weight: Tensor) -> Tensor:
        """Return what fprop makes of `weight`, rounded to nearest, in fp32 and of its shape."""
        recipe = operand_recipe(self.chosen.fprop.w, 0)
        assert recipe is not None
        rows, cols = weight.shape
        padded = F.pad(weight, (0, self.padding["k"], 0, self.padding["n"]))
        if self.columns is None:
            return emulate(padded, recipe.quantiser, 1).dequantised()[:rows, :cols]
        rest = None
        if len(self.columns.rest):
            rest = emulate(padded[:, self.columns.rest], recipe.quantiser, 1)
        outliers = in_fp8(padded[:, self.columns.outliers], 1)
        return self.columns.dequantised(rest, outliers)[:rows, :cols]

    @torch.no_grad()
    def keep_weight(self, dice: Dice) -> None:
        """Quantise the weight for all forward passes in training until `kept` is None again."""
        if self.native or self.columns is not None:
            return
        self.kept = weight_operands(
            self._filled_weight(),
            self.recipe,
            layer=self.index,
            dice=dice,
            delayed=self.delayed,
            tensor_cores=self.tensor_cores,
        )

    def _filled_weight(self) -> Tensor:
        k, n = self.padding.values()
        return F.pad(self.weight, (0, k, 0, n)) if k or n else self.weight

    def _check(self, tensor: Tensor, what: str) -> None:
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"precision.check_finite: the {what} of {self.name} has NaN or inf; lower the "
                f"learning rate, or keep the layer: precision.keep=['{self.name}']"
            )
