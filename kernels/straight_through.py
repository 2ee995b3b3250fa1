"""Weights and activations rounded in a forward pass, as if they were not in the backward pass.

Shape legend: rows = outputs, cols = inputs of a linear layer.
"""

from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.integers import int8_rows

_LEAST = 1e-5  # of a scale, which all-zero weights or activations would make 0


def ternary_codes(
    weight: Float[Tensor, "rows cols"],
) -> tuple[Float[Tensor, "rows cols"], Float[Tensor, "1 1"]]:
    """Return (-1, 0 and 1, what a step is worth): BitNet b1.58, arXiv 2402.17764, eqs. 1 to 3.

    The step is the mean magnitude of the matrix, which is what the nearest codes are relative to.
    """
    step = weight.float().abs().mean().clamp(min=_LEAST).view(1, 1)
    return (weight.float() / step).round().clamp(-1, 1), step


def ternary(weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """Return what `ternary_codes` stand for; gradients pass as if it were `weight`."""
    with torch.no_grad():
        codes, step = ternary_codes(weight)
        value = codes * step
    return _passed(weight, value)


def int8_tokens(x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch cols"]:
    """Return x in int8, a scale for each token: its largest magnitude is 127; gradients pass."""
    with torch.no_grad():
        codes, scales = int8_rows(x)
        value = (codes * scales).to(x.dtype)
    return _passed(x, value)


def lsq_range(bits: int) -> tuple[int, int]:
    """Return (smallest, largest) code of LSQ's weights."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def lsq_start(weight: Float[Tensor, "rows cols"], bits: int) -> Float[Tensor, "1"]:
    """Return the first step of LSQ: 2 mean|w| / sqrt(qmax)."""
    start: Tensor = 2 * weight.float().abs().mean().view(1) / sqrt(lsq_range(bits)[1])
    return start.clamp(min=_LEAST)


def lsq_codes(
    weight: Float[Tensor, "rows cols"], step: Float[Tensor, "1"], bits: int
) -> Float[Tensor, "rows cols"]:
    """Return the nearest codes; gradients pass inside the range."""
    low, high = lsq_range(bits)
    scaled = (weight.float() / step).clamp(low, high)
    return _passed(scaled, scaled.detach().round())


def lsq(
    weight: Float[Tensor, "rows cols"], step: Float[Tensor, "1"], bits: int
) -> Float[Tensor, "rows cols"]:
    """Return round(clamp(w / s)) s, s being learned (Esser et al., arXiv 1902.08153, eqs. 1 to 5).

    With q the code, d/ds is q - w / s inside the range and the range's end outside, times
    1 / sqrt(numel qmax); d/dw is 1 inside and 0 outside.
    """
    factor = 1 / sqrt(weight.numel() * lsq_range(bits)[1])
    slowed = _passed(step * factor, step.detach())
    return lsq_codes(weight, slowed, bits) * slowed


def _passed(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` to the last bit, with the gradient of `x`."""
    result: Tensor = _Passed.apply(x, value)  # type: ignore[no-untyped-call]
    return result


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
