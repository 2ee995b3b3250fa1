"""The random Hadamard transform: groups of a tensor multiplied by diag(signs) H / sqrt(d).

Both operands of a product change their basis along the dimension that is summed over: the product
stays, and outliers are spread over their group (QuaRot; NVFP4, section 4.2).
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from kernels.format_names import HADAMARD_SIZES, Signs
from kernels.triton_check import triton_agrees

# TransformerEngine's sign vector of 16; longer transforms repeat it.
_FIXED = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_IN_CACHE = 1 << 16  # elements that a CPU transforms at a time


def hadamard_matrix(
    size: int,
    signs: Signs = "fixed",
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Float[Tensor, "d d"]:
    """Return diag(signs) H / sqrt(size) in bf16, exact for 16 and 64 (entries 2**-k), else rounded.

    Signs of each step come from dice, see `with_signs`; here they are "none".

    Raises:
        ValueError: `size` is none of HADAMARD_SIZES.
    """
    if size not in HADAMARD_SIZES:
        raise ValueError(f"hadamard={size} is none of {', '.join(map(str, HADAMARD_SIZES))}")
    if torch.compiler.is_compiling():
        return _matrix(size, signs, seed, device)
    with unset_fake_temporarily():  # a cached matrix serves later, real calls
        return _cached_matrix(size, signs, seed, device)


def _matrix(size: int, signs: Signs, seed: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    if signs == "fixed":
        matrix = torch.tensor(_FIXED * (size // 16), dtype=torch.float32)[:, None] * matrix
    elif signs == "random":
        generator = torch.Generator().manual_seed(seed)
        random_signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1.0
        matrix = random_signs * matrix
    return (matrix / math.sqrt(size)).to(device=device, dtype=torch.bfloat16)


_cached_matrix = lru_cache(_matrix)


def with_signs(matrix: Float[Tensor, "d d"], bits: UInt8[Tensor, " d"]) -> Float[Tensor, "d d"]:
    """Return diag(signs) `matrix`, the sign of a row being minus where its byte is odd."""
    signs = 1.0 - 2.0 * (bits & 1).to(matrix.dtype)
    return signs[:, None] * matrix


def hadamard(
    x: Float[Tensor, "rows cols"], matrix: Float[Tensor, "d d"], dim: int
) -> Float[Tensor, "rows cols"]:
    """Return `x` in bf16, every group of d along `dim` (0 or 1) multiplied by `matrix`.

    Sums are fp32, rounded to bf16 once. Their order is that of the fast transform, on every device:
    sums and differences of neighbours, then of neighbouring pairs, and so on.

    Args:
        matrix: of `hadamard_matrix`, whatever its signs.

    Raises:
        ValueError: the size along `dim` is not a multiple of d.
    """
    d = matrix.shape[0]
    if x.shape[dim] % d:
        raise ValueError(
            f"size {x.shape[dim]} along dim {dim} is not a multiple of hadamard={d}; "
            f"pad to {-(-x.shape[dim] // d) * d}"
        )
    turned: Tensor = torch.ops.espalier.hadamard(x.to(torch.bfloat16), matrix[:, 0], dim)
    return turned


@torch.library.custom_op("espalier::hadamard", mutates_args=())
def _hadamard(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    if triton_agrees(x.device, _compare):
        from kernels import triton_hadamard  # noqa: PLC0415

        return triton_hadamard.hadamard(x, signs.contiguous(), dim)
    return eager_transform(x, signs, dim)


@_hadamard.register_fake
def _(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    return x.new_empty(x.shape)


def _compare(device: torch.device) -> None:
    """Raise ValueError where Triton's transform differs from the reference."""
    from kernels import triton_hadamard  # noqa: PLC0415

    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    signs = hadamard_matrix(16, device=device)[:, 0].contiguous()
    for dim in (0, 1):
        if not torch.equal(triton_hadamard.hadamard(x, signs, dim), eager_transform(x, signs, dim)):
            raise ValueError("the Hadamard transform differs from the reference")


def eager_transform(
    x: Float[Tensor, "rows cols"], signs: Float[Tensor, " d"], dim: int
) -> Float[Tensor, "rows cols"]:
    """Return `hadamard` of bf16 `x` by the reference, on any device.

    Args:
        signs: the first column of the matrix: signs over sqrt(d).
    """
    size = len(signs)
    # Groups one below the other, [groups, size, columns], or side by side, [1, size, groups].
    groups = x.reshape(-1, size, x.shape[1]) if dim == 0 else x.reshape(-1, size)
    out = torch.empty_like(groups)
    largest = _IN_CACHE if x.device.type == "cpu" else x.numel()
    at_a_time = max(1, largest // max(1, groups[:1].numel()))
    for part, place in zip(
        torch.split(groups, at_a_time), torch.split(out, at_a_time), strict=True
    ):
        if dim == 0:
            place.copy_(_sums_and_differences(part, signs))
        else:
            place.copy_(_sums_and_differences(part.T[None], signs)[0].T)
    return out.view(x.shape)


def _sums_and_differences(groups: Tensor, signs: Tensor) -> Tensor:
    # Products of bf16 are exact in fp32: a compiler that fuses them with a sum changes no bit.
    now = torch.empty(groups.shape, device=groups.device)
    then, half = torch.empty_like(now), 1
    torch.mul(groups, signs.float()[:, None], out=now)
    while half < len(signs):
        pairs, both = (t.view(-1, 2, half * groups.shape[2]) for t in (now, then))
        torch.add(pairs[:, 0], pairs[:, 1], out=both[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=both[:, 1])
        now, then, half = then, now, 2 * half
    return now
