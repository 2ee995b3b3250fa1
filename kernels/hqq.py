"""HQQ: a zero point for each group that suits heavy tails, without data.

Badri & Shaji, "Half-quadratic quantization of large machine learning models" (2023): |W - W^|_p
with p < 1 is split into e = shrink(W - W^), which takes what is far off, and the z that fits
W - e best in the mean; both in turn, beta growing.

Shape legend: rows, cols of the matrix.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.integers import IntegerGrid, in_bf16, integer_grid

_P, _BETA, _GROWTH, _TURNS = 0.7, 10.0, 1.01, 20


def hqq(
    weight: Float[Tensor, "rows cols"], bits: int, group: int | None = None
) -> tuple[IntegerGrid, Float[Tensor, "rows cols"]]:
    """Return (grid, codes) of `weight`, asymmetric; the zero points are no integers.

    The turn of the smallest |W - W^|_p counts, so that it is no worse than the min-max grid.
    """
    weight = weight.float()
    grid = integer_grid(weight, bits, group, symmetric=False)
    counted = _mean(torch.ones_like(weight), grid)
    best, beta, chosen = torch.inf, _BETA, grid
    for _ in range(_TURNS):
        codes = grid.codes(weight)
        error = weight - grid.values(codes)
        loss = float(error.abs().pow(_P).sum())
        if loss < best:
            best, chosen = loss, grid
        apart = _shrink(error, beta)
        scales = grid.spread(grid.scales, weight)
        offsets = codes - torch.where(scales > 0, (weight - apart) / scales, codes)
        zeros = in_bf16(_mean(offsets, grid) / counted)
        grid = IntegerGrid(grid.low, grid.high, grid.group, grid.scales, zeros)
        beta *= _GROWTH
    return chosen, chosen.codes(weight)


def _shrink(x: Tensor, beta: float) -> Tensor:
    """Return the generalised soft threshold of |x|_p."""
    magnitude = x.abs()
    usable = magnitude.clamp(min=1e-8)
    return x.sign() * (magnitude - usable.pow(_P - 1) / beta).clamp(min=0.0)


def _mean(x: Tensor, grid: IntegerGrid) -> Tensor:
    cols = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -cols % grid.group))
    return padded.view(len(x), -1, grid.group).mean(dim=2)
