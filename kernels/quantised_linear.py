"""y = x W^T with each of its three GEMMs under its own low-precision recipe.

    fprop   y[t, n]  = sum_k x[t, k] w[n, k]
    dgrad   dx[t, k] = sum_n g[t, n] w[n, k]
    wgrad   dw[n, k] = sum_t g[t, n] x[t, k]

Every operand is quantised along the dimension that its GEMM sums over. A weight in square blocks
has the same codes in fprop and dgrad and is quantised once. The gradient of the weight leaves its
GEMM in fp32.

Shape legend: tokens, k = width of x, n = width of y.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.codes import Codes
from kernels.emulate import Operand
from kernels.gemm_recipes import LinearRecipe
from kernels.operands import Delayed, Operands, Probe, dequantised, packed, split_mean
from kernels.outliers import Columns, fp8_mm, fprop_with_outliers
from kernels.philox import Dice
from kernels.scaled_mm import scaled_mm


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
    kept: tuple[Operand, Operand] | None = None,
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
        kept: `weight_operands` of the same arguments; not with `probe` or `columns`.
        columns: columns of x that fprop and wgrad, where they are quantised, take in FP8.

    Raises:
        ValueError: k or n is not a multiple of a block (tokens are padded with zeros).
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if not len(rows):  # an expert without tokens: there is no magnitude to scale by
        return F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16))
    if not torch.is_grad_enabled():  # autograd.Function would keep operands for a parameter
        weight = weight.detach()
    make = Operands(layer=layer, dice=dice, delayed=delayed, probe=probe, tensor_cores=tensor_cores)
    y: Tensor = _QuantisedLinear.apply(rows, weight, recipe, make, kept, columns)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def weight_operands(
    weight: Float[Tensor, "n k"],
    recipe: LinearRecipe,
    *,
    layer: int,
    dice: Dice | None,
    delayed: Delayed | None = None,
    tensor_cores: bool = False,
) -> tuple[Operand, Operand]:
    """Return w of fprop and w of dgrad, to be used for as long as the weight stays as it is.

    For the arguments see `quantised_linear`.
    """
    make = Operands(layer=layer, dice=dice, delayed=delayed, tensor_cores=tensor_cores)
    right, other = make.of_weight(weight, recipe)
    if other is None:
        taken = packed(right, recipe.fprop.right) if recipe.dgrad.dequantised else _alone(weight)
        other = _right_of_dgrad(taken, recipe, make)
    return right, other


def _right_of_dgrad(taken: Codes, recipe: LinearRecipe, make: Operands) -> Operand:
    """Return w of dgrad from what the forward pass keeps of the weight."""
    gemm, forward = recipe.dgrad, recipe.fprop.right
    weight = taken[0]
    if gemm.dequantised and forward is not None:
        weight = dequantised(taken, forward)
    return make(weight, gemm, gemm.right, 0, 3)


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        recipe: LinearRecipe,
        make: Operands,
        kept: tuple[Operand, Operand] | None,
        columns: Columns | None,
    ) -> Tensor:
        ctx.recipe, ctx.make, ctx.columns, ctx.tokens = recipe, make, columns, len(x)
        ctx.made_x, ctx.right = False, None
        if columns is not None and not recipe.fprop.plain:
            y, x, weight = _with_outliers(x, weight, recipe, make, columns)
            ctx.save_for_backward(*_alone(x), *_alone(weight))
            return y
        rest, mean = split_mean(x, recipe.fprop.left)
        left, of_x = make.of_input(rest, recipe, trains=ctx.needs_input_grad[1])
        right, other = kept or make.of_weight(weight, recipe)
        ctx.made_x = of_x is not None
        if of_x is None:
            of_x = packed(left, recipe.fprop.left) if recipe.wgrad.dequantised else _alone(x)
        of_weight = _alone(weight)
        if other is not None:
            ctx.right = (other.denominator, other.block, other.format)
            folded = other.folded if other.format else None
            of_weight = (other.values, other.numerator, other.scales, folded)
        elif recipe.dgrad.dequantised:
            of_weight = packed(right, recipe.fprop.right)
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
        grad_x = grad_weight = along = across = None
        if all(ctx.needs_input_grad[:2]):
            along, across = make.of_gradient(grad, recipe)
        if ctx.needs_input_grad[0]:
            left = along or make(grad, recipe.dgrad, recipe.dgrad.left, 1, 2)
            if ctx.right is not None:
                values, numerator, scales, folded = of_weight
                denominator, block, format = ctx.right
                right = Operand(values, numerator, denominator, scales, block, folded, format)
            elif ctx.columns is None:
                right = _right_of_dgrad(of_weight, recipe, make)
            else:
                right = make(of_weight[0], recipe.dgrad, recipe.dgrad.right, 0, 3)
            grad_x = scaled_mm(left, right, sums=(1, 0), fp32=False)[: ctx.tokens]
        if ctx.needs_input_grad[1]:
            grad_weight = _wgrad(ctx, grad, of_x, across)
        return grad_x, grad_weight, *[None] * 4


def _wgrad(ctx: Any, grad: Tensor, of_x: Codes, left: Operand | None) -> Tensor:
    """Return the gradient of the weight; `left` is that of the output as an operand, if made."""
    gemm, forward, make = ctx.recipe.wgrad, ctx.recipe.fprop.left, ctx.make
    if ctx.made_x:
        left = left or make(grad, gemm, gemm.left, 0, 4)
        return scaled_mm(left, make.kept_input(of_x, gemm.right), sums=(0, 0), fp32=True)
    x = of_x[0]
    if gemm.dequantised and ctx.columns is None and forward is not None:
        x = dequantised(of_x, forward)[: ctx.tokens]
    columns, grad_weight = None if gemm.plain else ctx.columns, None
    part = x if columns is None else x[:, columns.rest]
    if part.shape[1]:
        left = left or make(grad, gemm, gemm.left, 0, 4)
        rest, mean = split_mean(part, gemm.right)
        right = make(rest, gemm, gemm.right, 0, 5)
        grad_weight = scaled_mm(left, right, sums=(0, 0), fp32=True)
        if mean is not None:
            grad_weight += grad.float().sum(0)[:, None] * mean
    if columns is not None:
        grad_weight = columns.joined(grad_weight, fp8_mm(grad, x[:, columns.outliers], 0))
    assert grad_weight is not None
    return grad_weight


def _with_outliers(
    x: Tensor, weight: Tensor, recipe: LinearRecipe, make: Operands, columns: Columns
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and x and the weight as the backward pass takes them."""
    pair = None
    if len(columns.rest):
        left = make(x[:, columns.rest], recipe.fprop, recipe.fprop.left, 1, 0)
        right = make(weight[:, columns.rest], recipe.fprop, recipe.fprop.right, 1, 1)
        pair = left, right
    y, made_x, made_weight = fprop_with_outliers(x, weight, columns, pair)
    x = made_x if recipe.wgrad.dequantised else x
    return y, x, made_weight if recipe.dgrad.dequantised else weight


def _alone(tensor: Tensor) -> Codes:
    return tensor, None, None, None
