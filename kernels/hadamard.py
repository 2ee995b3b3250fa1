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

# TransformerEngine's sign vector of 16; longer transforms repeat it.
_FIXED = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


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

    Sums are fp32, rounded to bf16 once.

    Raises:
        ValueError: the size along `dim` is not a multiple of d.
    """
    d = matrix.shape[0]
    if x.shape[dim] % d:
        raise ValueError(
            f"size {x.shape[dim]} along dim {dim} is not a multiple of hadamard={d}; "
            f"pad to {-(-x.shape[dim] // d) * d}"
        )
    x = x.to(torch.bfloat16)
    if dim == 1:
        return (x.reshape(-1, d) @ matrix).view(x.shape)
    groups = x.view(-1, d, x.shape[1])
    return torch.matmul(matrix.T, groups).view(x.shape)
