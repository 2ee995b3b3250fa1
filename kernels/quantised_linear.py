"""y = x W^T with each of its three GEMMs under its own low-precision recipe.

    fprop   y[t, n]  = sum_k x[t, k] w[n, k]
    dgrad   dx[t, k] = sum_n g[t, n] w[n, k]
    wgrad   dw[n, k] = sum_t g[t, n] x[t, k]

Every operand is quantised along the dimension that its GEMM sums over. A weight quantised in square
blocks has the same codes in fprop and dgrad and is quantised once. The gradient of the weight leaves
its GEMM in fp32.

Shape legend: tokens, k = width of x, n = width of y.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.diagnostics import statistics
from kernels.emulate import Operand, Quantiser, emulate, emulate_both, fusible
from kernels.format_names import Signs
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.philox import Dice, rounding_bits
from kernels.scaled_mm import scaled_mm

OPERANDS = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")
Probe = dict[str, dict[str, Tensor]]  # statistics by operand
_STREAM = 1 << 16  # dropout draws from the layers below this


@dataclass(frozen=True, kw_only=True)
class OperandRecipe:
    """How one operand is rounded: None in its place leaves it in bf16.

    Args:
        quantile: the scale of the tensor is this quantile of |x| instead of its maximum.
        delayed: the scale of the tensor is that of earlier steps, see `Delayed`.
    """

    quantiser: Quantiser
    stochastic: bool = False
    quantile: float | None = None
    delayed: bool = False


@dataclass(frozen=True, kw_only=True)
class GemmRecipe:
    """Both operands of a GEMM, and the Hadamard transform of both along the summed dimension (0: none)."""

    left: OperandRecipe | None = None
    right: OperandRecipe | None = None
    hadamard: int = 0
    signs: Signs = "fixed"

    @property
    def plain(self) -> bool:
        """True where this is a bf16 GEMM."""
        return self.left is None and self.right is None


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """The GEMMs of a linear layer: x w, g w, g x."""

    fprop: GemmRecipe = field(default_factory=GemmRecipe)
    dgrad: GemmRecipe = field(default_factory=GemmRecipe)
    wgrad: GemmRecipe = field(default_factory=GemmRecipe)


@dataclass(frozen=True)
class Delayed:
    """Magnitudes of the six OPERANDS for delayed scaling.

    Args:
        amax: the largest of earlier steps, what scales are made of; seen: of this step, filled in here.
    """

    amax: Float[Tensor, " 6"]
    seen: Float[Tensor, " 6"]


def quantised_linear(
    x: Float[Tensor, "*tokens k"],
    weight: Float[Tensor, "n k"],
    recipe: LinearRecipe,
    *,
    layer: int,
    dice: Dice | None,
    delayed: Delayed | None = None,
    probe: Probe | None = None,
) -> Float[Tensor, "*tokens n"]:
    """Return x @ weight.T in bf16 under `recipe`.

    Args:
        layer: number of this linear, which addresses its random bits; dice: the rest of their address.
            Without them (evaluation) rounding is to nearest.
        delayed: needed where an operand is.
        probe: filled with `kernels.diagnostics.statistics` of each operand; not under torch.compile.

    Raises:
        ValueError: k or n is not a multiple of a block (tokens are filled up with zeros).
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if not len(rows):  # an expert that no token came to: there is no magnitude to scale by
        return F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16))
    y: Tensor = _QuantisedLinear.apply(rows, weight, recipe, layer, dice, delayed, probe)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        recipe: LinearRecipe,
        layer: int,
        dice: Dice | None,
        delayed: Delayed | None,
        probe: Probe | None,
    ) -> Tensor:
        make = _Operands(layer, dice, delayed, probe)
        left = make(x, recipe.fprop, recipe.fprop.left, 1, 0)
        right = make(weight, recipe.fprop, recipe.fprop.right, 1, 1)
        reuse = _same_codes(recipe)
        ctx.recipe, ctx.make, ctx.reuse = recipe, make, reuse
        ctx.denominator, ctx.block = right.denominator, right.block
        kept = (right.values, right.numerator, right.scales) if reuse else (weight, None, None)
        ctx.save_for_backward(x, *kept)
        return scaled_mm(left, right, sums=(1, 1), fp32=False)[: x.shape[0]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, numerator, scales = ctx.saved_tensors
        recipe, make = ctx.recipe, ctx.make
        grad = grad.to(torch.bfloat16).contiguous()
        grad_x = grad_weight = None
        along, across = make.both(grad, recipe) if all(ctx.needs_input_grad[:2]) else (None, None)
        if ctx.needs_input_grad[0]:
            gemm = recipe.dgrad
            left = along or make(grad, gemm, gemm.left, 1, 2)
            if ctx.reuse:
                right = Operand(weight, numerator, ctx.denominator, scales, ctx.block)
            else:
                right = make(weight, gemm, gemm.right, 0, 3)
            grad_x = scaled_mm(left, right, sums=(1, 0), fp32=False)[: x.shape[0]]
        if ctx.needs_input_grad[1]:
            gemm = recipe.wgrad
            left = across or make(grad, gemm, gemm.left, 0, 4)
            right = make(x, gemm, gemm.right, 0, 5)
            grad_weight = scaled_mm(left, right, sums=(0, 0), fp32=True)
        return grad_x, grad_weight, None, None, None, None, None


@dataclass(frozen=True)
class _Operands:
    """Makes the operands of one layer: `number` counts them as `Delayed` does."""

    layer: int
    dice: Dice | None
    delayed: Delayed | None
    probe: Probe | None

    def __call__(
        self, x: Tensor, gemm: GemmRecipe, how: OperandRecipe | None, dim: int, number: int
    ) -> Operand:
        tokens = x.shape[0]
        if not OPERANDS[number].endswith("w"):
            x = _filled(x, gemm, dim)
        before = x
        if gemm.hadamard:
            x = hadamard(x, hadamard_matrix(gemm.hadamard, gemm.signs, self.layer, x.device), dim)
        if how is None:
            return Operand(x.to(torch.bfloat16))
        amax, bits = None, self._bits(how, x, tokens, number)
        if how.delayed:
            assert self.delayed is not None
            amax = self.delayed.amax[number].clone()
            if self.dice is not None:
                seen = self.delayed.seen[number]
                seen.copy_(torch.maximum(seen, x.abs().amax()))
        elif how.quantile is not None:
            amax = _quantile(x, how.quantile)
        if self.probe is not None:
            found = how.quantiser.along(dim)(x, bits, amax)
            self.probe[OPERANDS[number]] = statistics(x, found, before if gemm.hadamard else None)
        return emulate(x, how.quantiser, dim, bits=bits, amax=amax)

    def both(self, grad: Tensor, recipe: LinearRecipe) -> tuple[Operand | None, Operand | None]:
        """Return the gradient as the left operand of dgrad and of wgrad where one kernel makes both."""
        one, two = recipe.dgrad.left, recipe.wgrad.left
        if one is None or one != two or self.probe is not None:
            return None, None
        plain = recipe.dgrad.hadamard == 0 and not one.delayed and one.quantile is None
        if not (plain and recipe.wgrad.hadamard and fusible(grad, one.quantiser)):
            return None, None
        x = _filled(grad, recipe.wgrad, 0)
        matrix = hadamard_matrix(recipe.wgrad.hadamard, recipe.wgrad.signs, self.layer, x.device)
        dice = [self._bits(how, x, grad.shape[0], n) for how, n in ((one, 2), (two, 4))]
        return emulate_both(x, one.quantiser, matrix, None if dice[0] is None else tuple(dice))  # type: ignore[arg-type]

    def _bits(self, how: OperandRecipe, x: Tensor, tokens: int, number: int) -> Tensor | None:
        """Return the dice of an operand, none for the rows below `tokens` that fill it up."""
        if not how.stochastic or self.dice is None:
            return None
        stream = _STREAM + len(OPERANDS) * self.layer + number
        bits = rounding_bits(self.dice, stream, tokens, x.shape[1])
        return F.pad(bits, (0, 0, 0, x.shape[0] - tokens)) if x.shape[0] > tokens else bits


def _same_codes(recipe: LinearRecipe) -> bool:
    """True where the weight has the same codes in fprop and dgrad."""
    forward, backward = recipe.fprop, recipe.dgrad
    square = (
        forward.right is not None
        and forward.right.quantiser.block[0] == forward.right.quantiser.block[1]
    )
    return (
        square and forward.right == backward.right and not (forward.hadamard or backward.hadamard)
    )


def _filled(x: Tensor, gemm: GemmRecipe, dim: int) -> Tensor:
    """Return `x` with as many zero tokens below as blocks need: they add nothing to any sum."""
    both = [how.quantiser.along(dim).block[0] for how in (gemm.left, gemm.right) if how is not None]
    size = max([1, *both, gemm.hadamard if dim == 0 else 1])
    missing = -x.shape[0] % size
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _quantile(x: Tensor, share: float) -> Tensor:
    """Return the smallest magnitude that `share` of all do not exceed."""
    index, size = max(1, round(share * x.numel())), x.float().abs().flatten()
    above = len(size) - index + 1
    if above <= len(size) // 8:  # a third of the time
        return size.topk(above).values[-1]
    return size.kthvalue(index).values
