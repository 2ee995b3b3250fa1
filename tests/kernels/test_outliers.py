"""A layer with outlier columns in FP8, against its definition in fp64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.gemm_recipes import LinearRecipe
from kernels.hadamard import hadamard
from kernels.operands import Operands
from kernels.outliers import Columns
from kernels.philox import Dice, NoiseKey
from kernels.quantised_linear import quantised_linear
from models.recipes import linear_recipe
from tests.kernels.oracles import inputs
from tests.plain_nodes import shipped

TOKENS, K, N, OUT = 128, 384, 128, 128


def _fp8(x: Tensor) -> Tensor:
    """E4M3 to nearest with the scale amax / 448 of each 128 elements of a row; ties as in fp32."""
    groups = x.float().reshape(len(x), -1, 128)
    scale = torch.div(torch.tensor(448.0), groups.abs().amax(2, keepdim=True))
    return ((groups * scale).to(torch.float8_e4m3fn).double() / scale.double()).view(x.shape)


def _recipe() -> LinearRecipe:
    """tetrajet_v2, its dice left out."""
    recipe = linear_recipe(shipped("precision", "tetrajet_v2").default)
    nearest = {
        name: replace(
            gemm,
            left=replace(gemm.left, stochastic=False),
            right=replace(gemm.right, stochastic=False),
        )
        for name, gemm in (("dgrad", recipe.dgrad), ("wgrad", recipe.wgrad))
    }
    return replace(recipe, **nearest)


@pytest.mark.parametrize("width", [K, OUT])  # all columns are outliers where there are no more
def test_outlier_columns_are_in_fp8_forward_and_in_wgrad_and_dgrad_takes_what_that_made(
    width: int,
) -> None:
    x, weight = inputs("normal", TOKENS, width).float(), inputs("normal", N, width, seed=1).float()
    grad = inputs("normal", TOKENS, N, seed=2)
    out = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:OUT].sort().values
    rest = torch.tensor([k for k in range(width) if k not in set(out.tolist())], dtype=torch.long)
    x[:, out] *= 30
    recipe, dice = _recipe(), Dice.of(NoiseKey(seed=5, step=0, samples=torch.arange(2)))
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    columns = Columns.of(out, width)
    y = quantised_linear(*leaves, recipe, layer=2, dice=dice, columns=columns)
    dx, dw = torch.autograd.grad(y, leaves, grad)

    fp4 = shipped("precision", "tetrajet_v2")
    quantiser = linear_recipe(fp4.default).fprop.right.quantiser
    make = Operands(layer=2, dice=dice)

    def q4(t: Tensor) -> Tensor:
        return quantiser(t).dequantise().double()

    def turned(t: Tensor, number: int) -> Tensor:
        gemm = recipe.dgrad if number == 1 else recipe.wgrad
        return hadamard(t.contiguous(), make._matrix(gemm, number, t.device), 1)

    kept = [torch.zeros(t.shape, dtype=torch.float64) for t in (x, weight)]
    for part, t in zip(kept, (x.bfloat16(), weight), strict=True):
        part[:, out] = _fp8(t[:, out])
        if len(rest):
            part[:, rest] = q4(t[:, rest])
    torch.testing.assert_close(y.double(), kept[0] @ kept[1].T, rtol=2.0**-7, atol=0.05)
    x_made, w_made = (part.bfloat16() for part in kept)

    g4, w4 = (q4(turned(t, 1)) for t in (grad, w_made.T))
    torch.testing.assert_close(dx.double(), g4 @ w4.T, rtol=2.0**-7, atol=0.02)
    wanted = torch.zeros(N, width, dtype=torch.float64)
    wanted[:, out] = _fp8(grad.T) @ _fp8(x_made[:, out].T).T
    if len(rest):
        wanted[:, rest] = q4(turned(grad.T, 2)) @ q4(turned(x_made[:, rest].T, 2)).T
    torch.testing.assert_close(dw.double(), wanted, rtol=1e-4, atol=0.02)
