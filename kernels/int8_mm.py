"""Products with a weight in int8, a scale for each row.

Shape legend: rows, n = outputs, k = inputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from kernels.integers import int8_rows


def int8_dynamic_linear(
    x: Float[Tensor, "*rows k"], codes: Int8[Tensor, "n k"], scales: Float[Tensor, " n"]
) -> Float[Tensor, "*rows n"]:
    """Return x W^T in the dtype of `x`, both in int8 and summed in int32: exact but for rounding.

    Each row of `x` has a scale of its own.
    """
    of_x, scale = int8_rows(x)
    product = torch._int_mm(of_x.flatten(0, -2), codes.T).float()
    y = product.view(*x.shape[:-1], -1) * scale * scales
    return y.to(x.dtype)


def int8_weight_linear(
    x: Float[Tensor, "*rows k"], codes: Int8[Tensor, "n k"], scales: Float[Tensor, " n"]
) -> Float[Tensor, "*rows n"]:
    """Return x W^T in the dtype of `x`, the weight alone being in int8."""
    if x.numel() == x.shape[-1] and torch.compiler.is_compiling():
        # Inductor's own loop reads a byte a weight; an mm would take them unpacked.
        product = (codes.float() * x.reshape(-1).float()).sum(-1)
        return (product * scales).to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, codes.to(x.dtype)) * scales.to(x.dtype)
