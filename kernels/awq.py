"""AWQ: channels of large activations are rounded more finely (Lin et al., arXiv 2306.00978).

x W^T = (x / s) (W s)^T with s_j = (mean |x_j|)^a: a large s_j makes the weights of channel j large
in their group, where their relative error is small. a is searched on a grid.

Shape legend: rows, cols of the matrix; cols are the channels of the input.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.integers import IntegerGrid, in_bf16, integer_grid

_STEPS = 20  # of a, from 0 to 1


def awq(
    weight: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    magnitudes: Float[Tensor, " cols"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
) -> tuple[IntegerGrid, Float[Tensor, "rows cols"], Float[Tensor, " cols"]]:
    """Return (grid, codes, 1 / s): the input is multiplied by the last before the product.

    Of all a the one is taken that leaves the smallest ||(W - W^) X||^2; a = 0 is rounding to
    nearest.

    Args:
        hessian: sum of x x^T over inputs, of any positive factor.
        magnitudes: the mean of |x| of each channel.

    Raises:
        ValueError: the weights or their inputs are not finite.
    """
    weight, best = weight.float(), torch.inf
    usual = magnitudes.float().clamp(min=1e-4)
    result: tuple[IntegerGrid, Tensor, Tensor] | None = None
    for step in range(_STEPS):
        scales = usual ** (step / _STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        inverse = in_bf16(1.0 / scales)
        grid = integer_grid(weight / inverse, bits, group, symmetric=symmetric)
        codes = grid.codes(weight / inverse)
        error = weight - grid.values(codes) * inverse
        loss = float(((error @ hessian.float()) * error).sum())
        if loss < best:
            best, result = loss, (grid, codes, inverse)
    if result is None:
        raise ValueError("no error of AWQ is finite: the weights or their inputs are not")
    return result
