"""The precision of sums that must not be rounded to a narrow format."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is if it is in fp64."""
    return x if x.dtype is torch.float64 else x.float()
