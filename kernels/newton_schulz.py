"""Orthogonalisation by Newton-Schulz iteration, the heart of Muon (Jordan et al., 2024)."""

import torch
from jaxtyping import Float
from torch import Tensor

# The quintic a x + b x^3 + c x^5 with the steepest slope at 0 that holds singular values within
# [0.68, 1.13]: Muon needs few steps more than values of exactly 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(
    matrix: Float[Tensor, "rows cols"], steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "rows cols"]:
    """Return a matrix with the singular vectors of `matrix` and singular values near 1.

    A zero matrix stays zero.

    Args:
        dtype: of the products and of the result.
    """
    x: Tensor = matrix.to(dtype)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if wide else x.T
