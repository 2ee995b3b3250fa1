"""GPTQ: rounding column after column, each error made up for by the columns that follow.

Frantar et al., arXiv 2210.17323, algorithm 1: with H = 2 / N sum x x^T + lambda I over the inputs
of a layer and U the upper Cholesky factor of H^-1, column i leaves e = (w_i - q_i) / U_ii, and
w_{>i} -= e U_{i,>i}. It is greedy: of ||(W - W^) X||^2 it finds no minimum, but most often less
than rounding to nearest leaves.

Shape legend: rows, cols of the matrix; cols are the channels of the input.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.integers import IntegerGrid, integer_grid

_BLOCK = 128  # columns whose errors reach those behind them by one product
_DAMPING = 0.01  # of the mean of H's diagonal


def gptq(
    weight: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
) -> tuple[IntegerGrid, Float[Tensor, "rows cols"]]:
    """Return (grid, codes) of `weight`.

    The grid of a group is made when its first column is reached, of the weights as corrected then.

    Args:
        hessian: sum of x x^T over inputs, of any positive factor.
    """
    left = weight.double().clone()
    rows, cols = left.shape
    group = cols if group is None else group
    root, dead = _inverse_root(hessian.double())
    left[:, dead] = 0.0
    codes = torch.empty(rows, cols)
    grids: list[IntegerGrid] = []
    for begin in range(0, cols, _BLOCK):
        end = min(begin + _BLOCK, cols)
        errors = left.new_zeros(rows, end - begin)
        for column in range(begin, end):
            if column % group == 0:
                whole = left[:, column : column + group].float().clone()
                if column + group > end:  # what is behind the block has not got its errors yet
                    behind = root[begin:column, end : column + group]
                    done = errors[:, : column - begin] @ behind
                    whole[:, end - column :] -= done.float()
                grids.append(integer_grid(whole, bits, symmetric=symmetric))
            now = left[:, column : column + 1]
            code = grids[-1].codes(now.float())
            codes[:, column] = code[:, 0]
            errors[:, column - begin] = ((now - grids[-1].values(code)) / root[column, column])[
                :, 0
            ]
            left[:, column + 1 : end] -= (
                errors[:, column - begin, None] * root[column, column + 1 : end]
            )
        left[:, end:] -= errors @ root[begin:end, end:]
    scales, zeros = (torch.cat([getattr(g, n) for g in grids], 1) for n in ("scales", "zeros"))
    return IntegerGrid(grids[0].low, grids[0].high, group, scales, zeros), codes


def _inverse_root(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return (upper Cholesky factor of the inverse, mask of the channels that are always 0)."""
    dead = hessian.diagonal() == 0
    damped = hessian.clone()
    mean = hessian.diagonal().mean()
    damped.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True), dead
