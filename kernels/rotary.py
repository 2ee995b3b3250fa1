"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in Llama.

Shape legend: batch, heads, seq, dim = head width.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def rotary_tables(
    seq: int, dim: int, base: float, device: torch.device
) -> tuple[Float[Tensor, "seq dim"], Float[Tensor, "seq dim"]]:
    """Return (cos, sin) in fp32 for positions 0..seq-1; the second half of sin is not negated."""
    return rotary_at(torch.arange(seq, device=device), dim, base)


def rotary_at(
    positions: Int64[Tensor, "... seq"], dim: int, base: float
) -> tuple[Float[Tensor, "... seq dim"], Float[Tensor, "... seq dim"]]:
    """As `rotary_tables`, for any positions."""
    inverse = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.to(torch.float32)[..., None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads seq dim"],
    cos: Float[Tensor, "*rows seq dim"],
    sin: Float[Tensor, "*rows seq dim"],
) -> Float[Tensor, "batch heads seq dim"]:
    """Return `x` with each pair (x_i, x_{i+dim/2}) turned by its position's angle."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.compiler.is_compiling():  # Inductor fuses the plain form
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Four passes over half of `x`, where plain autograd makes eleven; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    left, right = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(left, cos, out=out[..., :half]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=out[..., half:]).addcmul_(left, sin, value=sign)
    return out
