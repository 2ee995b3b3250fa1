"""Products on FP8 tensor cores by `torch._scaled_mm`, without TransformerEngine.

It takes operands with one scale of the tensor, E4M3 by E4M3 or E4M3 by E5M2, the first row by row
in memory and the second column by column, sizes being multiples of 16. Accumulation is the
hardware's, without its fast mode; the factor is applied to the accumulator, as in the emulation.

Shape legend: m, n, k = rows, columns and summed size of a product.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NEEDED = (8, 9)  # the compute capability of the first chip with FP8 units
FORMATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_MULTIPLE = 16


@torch.library.custom_op("espalier::float8_mm", mutates_args=())
def float8_mm(a: Tensor, b: Tensor, factor: Tensor, fp32: bool) -> Tensor:
    """Return a @ b times `factor` (`[]`, fp32), in bf16 or with `fp32` so.

    a is [m, k], b [k, n], both in float8; k is filled up with zeros to a multiple of 16. Nothing
    is copied where it is one, and a lies row by row and b column by column.

    Raises:
        RuntimeError: n is not a multiple of 16, or both operands are E5M2.
    """
    rows, columns = (_filled(t) for t in (a, b.T))
    product: Tensor = torch._scaled_mm(
        rows,
        columns.T,
        scale_a=factor,
        scale_b=torch.ones_like(factor),
        out_dtype=torch.float32 if fp32 else torch.bfloat16,
        use_fast_accum=False,
    )
    return product


def _filled(t: Tensor) -> Tensor:
    """Return `t` row by row in memory, with zeros to whole columns of 16; as it is if it is so."""
    missing = -t.shape[1] % _MULTIPLE
    filled = F.pad(t.view(torch.uint8), (0, missing)) if missing else t
    return filled.contiguous().view(t.dtype)


@float8_mm.register_fake
def _(a: Tensor, b: Tensor, factor: Tensor, fp32: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32 if fp32 else torch.bfloat16)


@lru_cache
def passed_over(device: torch.device) -> str | None:
    """Return why `float8_mm` is not used on `device`, None if it is: one product is tried."""
    return refusal(device, NEEDED, "FP8", lambda: wrong_product(device))


def refusal(
    device: torch.device, needed: tuple[int, int], what: str, trial: Callable[[], str | None]
) -> str | None:
    """Return why `torch._scaled_mm` is not used on `device`, None if it is.

    Args:
        needed: the least compute capability.
        what: the format, in words.
        trial: multiplies, and returns what is wrong with the product.
    """
    if device.type != "cuda":
        return f"only a GPU has {what} tensor cores"
    capability = torch.cuda.get_device_capability(device)
    if capability < needed:
        least, given = (f"{major}.{minor}" for major, minor in (needed, capability))
        return f"torch._scaled_mm in {what} needs compute capability {least}, not {given}"
    try:
        return trial()
    except Exception as error:  # whatever it raises, the emulation is right
        first = str(error).partition("\n")[0]
        return f"torch._scaled_mm failed: {type(error).__name__}: {first}"


def wrong_product(device: torch.device) -> str | None:
    """Return what is wrong with products of `device` beside those in fp32, None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 136, generator=generator).to(device) for rows in (48, 64))
    factor = torch.full((), 0.75, device=device)
    for first, second in (("fp8_e4m3", "fp8_e4m3"), ("fp8_e5m2", "fp8_e4m3")):
        a, b = x.to(FORMATS[first]), w.to(FORMATS[second])
        exact: Float[Tensor, "m n"] = a.float() @ b.float().T * factor
        for fp32 in (False, True):
            error = float((float8_mm(a, b.T, factor, fp32) - exact).norm() / exact.norm())
            if not error < 2**-7:  # one rounding to bf16 has up to 2**-8; NaN compares false
                return f"torch._scaled_mm: {first} by {second} is off by {error:.3f} of its norm"
    return None
