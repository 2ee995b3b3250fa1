"""y = x W^T with each of its three GEMMs under its own low-precision recipe.

    fprop   y[t, n]  = sum_k x[t, k] w[n, k]
    dgrad   dx[t, k] = sum_n g[t, n] w[n, k]
    wgrad   dw[n, k] = sum_t g[t, n] x[t, k]

Every operand is quantised along the dimension that its GEMM sums over. A weight in square blocks
has the same codes in fprop and dgrad and is quantised once. The gradient of the weight leaves its
GEMM in fp32.

Shape legend: tokens, k = width of x, n = width of y.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.codes import Codes, pack_operand, unpack_operand
from kernels.diagnostics import statistics
from kernels.emulate import Operand, emulate, emulate_both, fusible
from kernels.float8_mm import FORMATS
from kernels.gemm_recipes import GemmRecipe, LinearRecipe, OperandRecipe
from kernels.hadamard import hadamard, hadamard_matrix, with_signs
from kernels.outliers import Columns, fp8_mm, fprop_with_outliers
from kernels.philox import Dice, Draw, rounding_bits
from kernels.quantise import TENSOR
from kernels.scaled_mm import scaled_mm

OPERANDS = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")
Probe = dict[str, dict[str, Tensor]]  # statistics by operand
_STREAM = 1 << 16  # dropout draws from the layers below this
_SIGNS = 1 << 28  # and the signs of Hadamard transforms from those above this


@dataclass(frozen=True)
class Delayed:
    """Magnitudes of the six OPERANDS for delayed scaling.

    Args:
        amax: the largest of earlier steps, from which scales are made.
        seen: the largest of this step, updated by `quantised_linear`.
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
    tensor_cores: bool = False,
    kept: dict[int, Operand] | None = None,
    columns: Columns | None = None,
) -> Float[Tensor, "*tokens n"]:
    """Return x @ weight.T in bf16 under `recipe`.

    Args:
        layer: number of this linear, part of the address of its random bits.
        dice: the rest of that address; None (evaluation) rounds to nearest.
        delayed: required where an operand of `recipe` is delayed.
        probe: receives `kernels.diagnostics.statistics` of each operand; not under torch.compile.
        tensor_cores: multiply by `torch._scaled_mm`; only where `kernels.tensor_cores` has no
            reason against it, and not with `columns`.
        kept: operands of the weight by their index in OPERANDS, which the first call fills in and
            later ones read; not under torch.compile.
        columns: columns of x that fprop and wgrad, where they are quantised, take in FP8.

    Raises:
        ValueError: k or n is not a multiple of a block (tokens are padded with zeros).
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if not len(rows):  # an expert without tokens: there is no magnitude to scale by
        return F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16))
    y: Tensor = _QuantisedLinear.apply(  # type: ignore[no-untyped-call]
        rows, weight, recipe, layer, dice, delayed, probe, tensor_cores, kept, columns
    )
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
        tensor_cores: bool,
        kept: dict[int, Operand] | None,
        columns: Columns | None,
    ) -> Tensor:
        make = _Operands(layer, dice, delayed, probe, tensor_cores, kept)
        ctx.recipe, ctx.make, ctx.columns, ctx.tokens = recipe, make, columns, len(x)
        if columns is not None and not recipe.fprop.plain:
            pair = None
            if len(columns.rest):
                part = x[:, columns.rest], weight[:, columns.rest]
                left = make(part[0], recipe.fprop, recipe.fprop.left, 1, 0)
                pair = left, make.of_weight(part[1], recipe.fprop, 1, 1)
            y, *quantised = fprop_with_outliers(x, weight, columns, pair)
            ctx.reuse = ctx.same_x = False
            x = quantised[0] if recipe.wgrad.dequantised else x
            weight = quantised[1] if recipe.dgrad.dequantised else weight
            ctx.save_for_backward(*_alone(x), *_alone(weight))
            return y
        rest, mean = _split(x, recipe.fprop.left)
        left = make(rest, recipe.fprop, recipe.fprop.left, 1, 0)
        right = make.of_weight(weight, recipe.fprop, 1, 1)
        reuse = _same_codes(recipe)
        ctx.reuse, ctx.right = reuse, (right.denominator, right.block, right.format)
        ctx.same_x = probe is None and _same_either_way(recipe.fprop, recipe.wgrad, of_x=True)
        of_x: Codes = (left.values, left.numerator, None, None) if ctx.same_x else _alone(x)
        if recipe.wgrad.dequantised:
            of_x = _packed(left, recipe.fprop.left)
        of_weight = _alone(weight)
        if reuse:
            folded = right.folded if right.format else None
            of_weight = (right.values, right.numerator, right.scales, folded)
        if recipe.dgrad.dequantised:
            of_weight = _packed(right, recipe.fprop.right)
        ctx.save_for_backward(*of_x, *of_weight)
        y = scaled_mm(left, right, sums=(1, 1), fp32=mean is not None)[: x.shape[0]]
        if mean is not None:  # no product, which autocast would make in bf16
            y = (y + (weight.float() * mean).sum(dim=1)).to(torch.bfloat16)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recipe, make = ctx.recipe, ctx.make
        saved = ctx.saved_tensors  # read once: checkpointing repeats the forward pass for it
        of_x, of_weight = saved[:4], saved[4:]
        grad = grad.to(torch.bfloat16).contiguous()
        grad_x = grad_weight = None
        along, across = make.both(grad, recipe) if all(ctx.needs_input_grad[:2]) else (None, None)
        if ctx.needs_input_grad[0]:
            gemm = recipe.dgrad
            left = along or make(grad, gemm, gemm.left, 1, 2)
            if ctx.reuse:
                weight, numerator, scales, folded = of_weight
                denominator, block, format = ctx.right
                right = Operand(weight, numerator, denominator, scales, block, folded, format)
            else:
                packed = gemm.dequantised and ctx.columns is None and recipe.fprop.right
                weight = _dequantised(of_weight, packed) if packed else of_weight[0]
                right = make.of_weight(weight, gemm, 0, 3)
            grad_x = scaled_mm(left, right, sums=(1, 0), fp32=False)[: ctx.tokens]
        if ctx.needs_input_grad[1]:
            gemm = recipe.wgrad
            packed = gemm.dequantised and ctx.columns is None and recipe.fprop.left
            x = _dequantised(of_x, packed)[: ctx.tokens] if packed else of_x[0]
            columns = None if gemm.plain else ctx.columns
            part = x if columns is None else x[:, columns.rest]
            if part.shape[1]:
                left = across or make(grad, gemm, gemm.left, 0, 4)
                rest, mean = (part, None) if ctx.same_x else _split(part, gemm.right)
                one_x = Operand(x, of_x[1]) if ctx.same_x else None
                right = one_x or make(rest, gemm, gemm.right, 0, 5)
                grad_weight = scaled_mm(left, right, sums=(0, 0), fp32=True)
                if mean is not None:
                    grad_weight += grad.float().sum(0)[:, None] * mean
            if columns is not None:
                outliers = fp8_mm(grad, x[:, columns.outliers], 0)
                grad_weight = columns.joined(grad_weight, outliers)
        return grad_x, grad_weight, *[None] * 8


@dataclass(frozen=True)
class _Operands:
    """Makes the operands of one layer; `number` is an operand's index in OPERANDS."""

    layer: int
    dice: Dice | None
    delayed: Delayed | None
    probe: Probe | None
    tensor_cores: bool
    kept: dict[int, Operand] | None

    def of_weight(self, weight: Tensor, gemm: GemmRecipe, dim: int, number: int) -> Operand:
        """Return the right operand of fprop or dgrad, `kept` if it is."""
        if self.kept is None or self.probe is not None:
            return self(weight, gemm, gemm.right, dim, number)
        if number not in self.kept:
            self.kept[number] = self(weight, gemm, gemm.right, dim, number)
        return self.kept[number]

    def __call__(
        self, x: Tensor, gemm: GemmRecipe, operand: OperandRecipe | None, dim: int, number: int
    ) -> Operand:
        tokens = x.shape[0]
        if not OPERANDS[number].endswith("w"):
            x = _padded(x, gemm, dim)
        before = x
        if gemm.hadamard:
            x = hadamard(x, self._matrix(gemm, number // 2, x.device), dim)
        if operand is None:
            return Operand(x.to(torch.bfloat16))
        amax, draw = None, self._draw(operand, x, tokens, number)
        if operand.delayed:
            assert self.delayed is not None
            amax = self.delayed.amax[number].clone()
            if self.dice is not None:
                seen = self.delayed.seen[number]
                seen.copy_(torch.maximum(seen, torch.linalg.vector_norm(x, inf)))
        elif operand.quantile is not None:
            amax = _quantile(x, operand.quantile)
        if self.probe is not None:
            bits = None if draw is None else draw.bits(*x.shape)
            quantised = operand.quantiser.along(dim)(x, bits, amax)
            untransformed = before if gemm.hadamard else None
            self.probe[OPERANDS[number]] = statistics(x, quantised, untransformed)
        made = emulate(x, operand.quantiser, dim, draw=draw, amax=amax)
        return self._on_tensor_cores(made, operand) if self.tensor_cores else made

    def both(self, grad: Tensor, recipe: LinearRecipe) -> tuple[Operand | None, Operand | None]:
        """Return the left operands of dgrad and wgrad from one read, (None, None) without it."""
        operand = recipe.dgrad.left
        if self.probe is None and _same_either_way(recipe.dgrad, recipe.wgrad, of_x=False):
            made = self(grad, recipe.dgrad, operand, 1, 2)
            return made, made
        if operand is None or operand != recipe.wgrad.left or self.probe is not None:
            return None, None
        plain = recipe.dgrad.hadamard == 0 and not operand.delayed and operand.quantile is None
        if not (plain and fusible(grad, operand.quantiser, recipe.wgrad.hadamard)):
            return None, None
        x = _padded(grad, recipe.wgrad, 0)
        matrix = self._matrix(recipe.wgrad, 2, x.device) if recipe.wgrad.hadamard else None
        along, across = (self._draw(operand, x, len(grad), number) for number in (2, 4))
        draws = None if along is None or across is None else (along, across)
        made_along, made_across = emulate_both(x, operand.quantiser, matrix, draws)
        if not self.tensor_cores:
            return made_along, made_across
        return self._on_tensor_cores(made_along, operand), self._on_tensor_cores(
            made_across, operand
        )

    @staticmethod
    def _on_tensor_cores(made: Operand, operand: OperandRecipe) -> Operand:
        """Return `made` for `torch._scaled_mm`: its FP8 elements, or the format of its blocks."""
        format = operand.quantiser.format
        if format in FORMATS:
            return replace(made, values=made.values.to(FORMATS[format]))
        return replace(made, format=format)

    def _matrix(self, gemm: GemmRecipe, number: int, device: torch.device) -> Tensor:
        """Return the transform of both operands of a GEMM, whose `number` is 0, 1 or 2."""
        if gemm.signs not in ("step", "backward"):
            return hadamard_matrix(gemm.hadamard, gemm.signs, self.layer, device)
        if self.dice is None:
            return hadamard_matrix(gemm.hadamard, "fixed", self.layer, device)
        matrix = hadamard_matrix(gemm.hadamard, "none", self.layer, device)
        number = 1 if gemm.signs == "backward" else number
        stream = _SIGNS + 3 * self.layer + number
        return with_signs(
            matrix, rounding_bits(_of_no_sample(self.dice), stream, 1, len(matrix))[0]
        )

    def _draw(self, operand: OperandRecipe, x: Tensor, tokens: int, number: int) -> Draw | None:
        """Return the dice of an operand; rows beyond `tokens` are padding."""
        if not operand.stochastic or self.dice is None:
            return None
        stream = _STREAM + len(OPERANDS) * self.layer + number
        if OPERANDS[number].endswith("w"):
            return Draw(_of_no_sample(self.dice), stream, x.shape[0])
        return Draw(self.dice, stream, tokens)


def _alone(tensor: Tensor) -> Codes:
    return tensor, None, None, None


def _packed(operand: Operand, recipe: OperandRecipe | None) -> Codes:
    """Return what fprop has made of an operand, to be kept for the backward pass."""
    if recipe is None:
        return _alone(operand.values)
    return pack_operand(operand, recipe.quantiser)


def _dequantised(codes: Codes, recipe: OperandRecipe) -> Tensor:
    return unpack_operand(codes, recipe.quantiser).dequantised().to(torch.bfloat16)


def _of_no_sample(dice: Dice) -> Dice:
    """Return the dice of what belongs to a step and to none of its samples, as a weight does."""
    return Dice(torch.zeros_like(dice.samples[:1]), dice.key)


def _same_codes(recipe: LinearRecipe) -> bool:
    """Return whether the weight has the same codes in fprop and dgrad."""
    forward, backward = recipe.fprop, recipe.dgrad
    if forward.right is None or forward.right != backward.right or backward.dequantised:
        return False
    rows, cols = forward.right.quantiser.block
    return rows == cols and not (forward.hadamard or backward.hadamard)


def fits_float8(recipe: LinearRecipe) -> bool:
    """Return whether `kernels.float8_mm` multiplies every GEMM that `recipe` quantises."""
    gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
    return any(not gemm.plain for gemm in gemms) and all(
        gemm.plain or (_tensor_wide(gemm) and _formats(gemm) != {"fp8_e5m2"}) for gemm in gemms
    )


def _formats(gemm: GemmRecipe) -> set[str]:
    return {o.quantiser.format for o in (gemm.left, gemm.right) if o is not None}


def _tensor_wide(gemm: GemmRecipe) -> bool:
    """Return whether both operands are FP8 with one scale of the tensor, and are not changed."""
    operands = (gemm.left, gemm.right)
    return not (gemm.hadamard or gemm.dequantised) and all(
        operand is not None
        and operand.quantiser.format in FORMATS
        and operand.quantiser.block == TENSOR
        and not operand.centred
        for operand in operands
    )


def _same_either_way(first: GemmRecipe, wgrad: GemmRecipe, *, of_x: bool) -> bool:
    """Return whether x has the same codes in fprop and wgrad, or the gradient in dgrad and wgrad.

    A scale of the tensor is the same whichever dimension is summed over; delayed scales have a
    history for each operand.
    """
    mine, other = first.left, wgrad.right if of_x else wgrad.left
    if mine is None or mine != other or mine.delayed:
        return False
    return _tensor_wide(first) and _tensor_wide(wgrad)


def _padded(x: Tensor, gemm: GemmRecipe, dim: int) -> Tensor:
    """Return `x` with zero tokens appended up to whole blocks; they add nothing to any sum."""
    operands = [operand for operand in (gemm.left, gemm.right) if operand is not None]
    blocks = [operand.quantiser.along(dim).span[0] for operand in operands]
    size = max([1, *blocks, gemm.hadamard if dim == 0 else 1])
    missing = -x.shape[0] % size
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _split(x: Tensor, operand: OperandRecipe | None) -> tuple[Tensor, Tensor | None]:
    """Return `x` without its mean over tokens, in bf16, and the mean; `x`, None if not centred."""
    if operand is None or not operand.centred:
        return x, None
    mean = x.float().mean(dim=0)
    return (x.float() - mean).to(torch.bfloat16), mean


def _quantile(x: Tensor, share: float) -> Tensor:
    """Return the smallest magnitude that `share` of all do not exceed."""
    magnitudes = x.float().abs().flatten()
    rank = max(1, round(share * len(magnitudes)))
    above = len(magnitudes) - rank + 1
    if above <= len(magnitudes) // 8:  # topk takes a third of the time there
        return magnitudes.topk(above).values[-1]
    return magnitudes.kthvalue(rank).values
