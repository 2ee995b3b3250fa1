"""The product of two emulated operands: bf16 in, fp32 accumulation, the fp32 factor applied once.

On a CPU oneDNN applies the factor to the fp32 accumulator before it rounds to bf16, at the speed of
a plain bf16 product. For an fp32 result it is allowed to compute an fp32 product in bf16, which is
exact for operands that are bf16. On a GPU the product has an fp32 output, multiplied by the factor
after; compiled, by the kernel that reads it. Operands in float8 go to its tensor cores
(`kernels.float8_mm`), those with a format to Blackwell's (`kernels.block_scaled_mm`).

Shape legend: m, n, k = rows, columns and summed size of a product.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import block_scaled_mm, float8_mm  # noqa: F401  # the ops
from kernels.emulate import Operand
from kernels.formats import quotient


def scaled_mm(a: Operand, b: Operand, *, sums: tuple[int, int], fp32: bool) -> Float[Tensor, "m n"]:
    """Return the product of `a` and `b` summed over dimension sums[0] of `a` and sums[1] of `b`.

    Error against the exact product of the dequantised operands: k * 2**-24 relative to the sum of
    magnitudes (fp32 accumulation), and half a bf16 step where the output is bf16.

    Args:
        fp32: return fp32, else bf16.
    """
    left = a.values if sums[0] == 1 else a.values.T
    right = b.values.T if sums[1] == 1 else b.values
    factor = _factor(a, b, sums, left.device)
    if left.dtype.itemsize == 1:
        return torch.ops.espalier.float8_mm(left, right, factor, fp32)  # type: ignore[no-any-return]
    if a.format:
        operands = (*_along_sum(a, sums[0]), *_along_sum(b, sums[1]))
        return torch.ops.espalier.block_scaled_mm(*operands, factor, a.format, fp32)  # type: ignore[no-any-return]
    if a.scales is not None or b.scales is not None:
        return _by_blocks(a, b, left, right, factor, sums, fp32=fp32)
    if not fp32 and _applies_factor(left, factor):
        return torch.ops.espalier.scaled_mm(left, right, factor)  # type: ignore[no-any-return]
    product = torch.ops.espalier.product(left, right)
    return product.mul_(factor) if fp32 else _rounded(product, factor)


def _along_sum(operand: Operand, dim: int) -> tuple[Tensor, Tensor]:
    """Return values and bytes of scales, the summed dimension `dim` being turned into columns."""
    assert operand.folded is not None
    values, folded = operand.values, operand.folded
    return (values, folded) if dim == 1 else (values.T, folded.T)


def _factor(a: Operand, b: Operand, sums: tuple[int, int], device: torch.device) -> Tensor:
    """Return numerators over denominators: `[]`, or broadcastable to [m, n] with scales of rows."""
    left, right = a.numerator, b.numerator
    left = left.T if left is not None and left.ndim and sums[0] == 0 else left
    right = right.T if right is not None and right.ndim and sums[1] == 1 else right
    if left is None or right is None:
        one = left if right is None else right
        product = torch.ones((), device=device) if one is None else one
    else:
        product = left * right
    denominator = a.denominator * b.denominator
    return product if denominator == 1.0 else quotient(product, denominator)


def _applies_factor(a: Tensor, factor: Tensor) -> bool:
    """Return whether the product itself applies the factor before it rounds to bf16."""
    return a.device.type == "cpu" and factor.numel() == 1


def _rounded(product: Tensor, factor: Tensor) -> Tensor:
    """Return product * factor, rounded to bf16 once."""
    if torch.compiler.is_compiling():  # one kernel with what reads it
        return (product * factor).to(torch.bfloat16)
    rounded = torch.empty(product.shape, dtype=torch.bfloat16, device=product.device)
    return torch.mul(product, factor, out=rounded)  # one kernel: rounds as it writes


@torch.library.custom_op("espalier::scaled_mm", mutates_args=())
def _scaled_mm(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)
        return torch.addmm(out, a, b, beta=0, alpha=float(factor), out=out)


@_scaled_mm.register_fake
def _(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)


@torch.library.custom_op("espalier::product", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type != "cpu":
            return torch.mm(a, b, out_dtype=torch.float32)
        with _products_in_bf16():
            return torch.mm(a.float(), b.float())


@_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


_ONE_AT_A_TIME = threading.Lock()  # of two threads the second would restore what the first has set


@contextmanager
def _products_in_bf16() -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _ONE_AT_A_TIME:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


def _by_blocks(
    a: Operand,
    b: Operand,
    left: Tensor,
    right: Tensor,
    factor: Tensor,
    sums: tuple[int, int],
    *,
    fp32: bool,
) -> Tensor:
    """Return the sum over blocks of k of products, each times its scales of rows and columns."""
    size = max(
        a.block[sums[0]] if a.scales is not None else 1,
        b.block[sums[1]] if b.scales is not None else 1,
    )
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    for index, start in enumerate(range(0, left.shape[1], size)):
        part = slice(start, start + size)
        product = torch.ops.espalier.product(left[:, part], right[part])
        rows, columns = (
            _scales(o, dim, index, o.values.shape[1 - dim])
            for o, dim in zip((a, b), sums, strict=True)
        )
        total += product * rows[:, None] * columns[None]
    return total.mul_(factor) if fp32 else _rounded(total, factor)


def _scales(operand: Operand, dim: int, index: int, size: int) -> Tensor:
    """Return the scales of `size` rows (or columns) in block `index` of the summed dimension."""
    if operand.scales is None:
        return torch.ones(size, device=operand.values.device)
    scales = operand.scales.select(dim, index)
    return scales.repeat_interleave(operand.block[1 - dim])[:size]
