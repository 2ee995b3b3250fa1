"""Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in Llama.

Shape legend: batch, heads, seq, dim = head width, pairs = dim / 2.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def rotary_frequencies(dim: int, base: float, device: torch.device) -> Float[Tensor, " pairs"]:
    """Return the angle per position of each pair of a head, base^(-2i/dim), fp32."""
    exponents = -torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    frequencies: Tensor = base**exponents
    return frequencies


def rotary_tables(
    positions: Int64[Tensor, "... seq"], frequencies: Float[Tensor, " pairs"], gain: float = 1.0
) -> tuple[Float[Tensor, "... seq dim"], Float[Tensor, "... seq dim"]]:
    """Return (cos, sin) in fp32, times `gain`; the second half of sin is not negated."""
    angles = positions.to(torch.float32)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    compiling = torch.compiler.is_compiling()
    cos, sin = _COS_SIN_OP(angles) if compiling else _cos_sin(angles)
    return (cos, sin) if gain == 1.0 else (cos * gain, sin * gain)


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def _shapes_of_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(angles), torch.empty_like(angles)


# Opaque: what Inductor can look into, it computes anew for each query and key of each layer.
_NAME = "espalier::cos_sin"
torch.library.define(_NAME, "(Tensor angles) -> (Tensor, Tensor)")
torch.library.impl(_NAME, ("CPU", "CUDA"), _cos_sin)
torch.library.register_fake(_NAME, _shapes_of_tables)
_COS_SIN_OP = torch.ops.espalier.cos_sin.default


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
    if not torch.is_grad_enabled():  # a third of the time of a decoded token's turn is autograd's
        return _turn(x, cos, sin, 1.0)
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
