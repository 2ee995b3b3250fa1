"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in Llama.

Shape legend: batch, heads, seq, dim = head width.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_tables(
    seq: int, dim: int, base: float, device: torch.device
) -> tuple[Float[Tensor, "seq dim"], Float[Tensor, "seq dim"]]:
    """Return (cos, sin) in fp32 for positions 0..seq-1; the second half of sin is not negated."""
    inverse = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.arange(seq, device=device, dtype=torch.float32)[:, None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads seq dim"],
    cos: Float[Tensor, "seq dim"],
    sin: Float[Tensor, "seq dim"],
) -> Float[Tensor, "batch heads seq dim"]:
    """Return `x` with each pair (x_i, x_{i+dim/2}) turned by its position's angle."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
