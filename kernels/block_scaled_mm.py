"""Products on Blackwell's tensor cores by `torch._scaled_mm`: NVFP4, MXFP4 and MXFP8.

An operand goes there as codes, two of four bits a byte, both matrices row by row along the summed
dimension, and as a scale for each 1 x 16 (NVFP4, E4M3) or 1 x 32 (MX, E8M0) in cuBLAS's tiles of
128 x 4. The product leaves in fp32 and takes the global factor, as in the emulation, before it is
rounded once. Accumulation is the hardware's.

Shape legend: m, n, k = rows, columns and summed size of a product; rows, cols of a matrix of
scales.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Shaped, UInt8
from torch import Tensor

from kernels.codes import pack_elements
from kernels.emulate import emulate
from kernels.float8_mm import refusal
from kernels.format_names import Format
from kernels.quantiser import Quantiser

NEEDED = (10, 0)  # the compute capability of the first chip with units for scales of blocks
BLOCKS: dict[str, int] = {"nvfp4": 16, "mxfp4": 32, "mxfp8_e4m3": 32}  # elements of a scale
_MULTIPLE = 32  # 16 bytes a row of four bits
_TILE = (128, 4)
_PARTS = (4, 32)  # a tile's rows lie 32 apart, four to 16 bytes


@torch.library.custom_op("espalier::block_scaled_mm", mutates_args=())
def block_scaled_mm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    factor: Tensor,
    format: str,
    fp32: bool,
) -> Tensor:
    """Return a @ b.T times `factor` (`[]`, or of rows and columns), in bf16 or with `fp32` so.

    Args:
        a, b: elements x scales in bf16, [m, k] and [n, k], which `kernels.emulate` has made.
        a_scales, b_scales: bytes of these scales, one for each block.
        format: a key of BLOCKS.

    Raises:
        RuntimeError: the device has no such units.
    """
    size, (m, n) = BLOCKS[format], (a.shape[0], b.shape[0])
    rows, columns = _codes(a, a_scales, format), _codes(b, b_scales, format)
    scales = [_stored(o, s, size, format) for o, s in ((a, a_scales), (b, b_scales))]
    multiply = _mxfp4 if format == "mxfp4" else _multiply
    product = multiply(rows, columns.T, scales[0], scales[1])[:m, :n]
    if fp32:
        return product * factor
    rounded = torch.empty(product.shape, dtype=torch.bfloat16, device=a.device)
    return torch.mul(product, factor, out=rounded)


@block_scaled_mm.register_fake
def _(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    factor: Tensor,
    format: str,
    fp32: bool,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32 if fp32 else torch.bfloat16)


def swizzle_scales(scales: UInt8[Tensor, "rows cols"]) -> UInt8[Tensor, " padded"]:
    """Return scales as cuBLAS reads them: tiles of 128 x 4, each of 32 rows of 16 bytes.

    Byte (i, j) of a tile lies at i % 32 * 16 + i // 32 * 4 + j; zeros fill up the last tiles.
    """
    tall, wide = _TILE
    padded = F.pad(scales, (0, -scales.shape[1] % wide, 0, -scales.shape[0] % tall))
    tiles = padded.view(padded.shape[0] // tall, *_PARTS, padded.shape[1] // wide, wide)
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def unswizzle_scales(
    swizzled: UInt8[Tensor, " padded"], rows: int, cols: int
) -> UInt8[Tensor, "rows cols"]:
    """Return the `rows` x `cols` scales of `swizzle_scales`."""
    tall, wide = _TILE
    tiles = swizzled.view(-(-rows // tall), -(-cols // wide), *_PARTS[::-1], wide)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // tall) * tall, -1)[:rows, :cols]


def _codes(values: Tensor, scales: Tensor, format: str) -> Shaped[Tensor, "rows bytes"]:
    """Return the codes of an operand, rows and columns filled up with zeros to multiples of 32."""
    codes = pack_elements(values.contiguous(), scales, _quantiser(values, scales, format))
    four_bits = codes.shape[1] < values.shape[1]
    missing = -values.shape[1] % _MULTIPLE // (2 if four_bits else 1)
    codes = F.pad(codes, (0, missing, 0, -values.shape[0] % _MULTIPLE))
    return codes.view(torch.float4_e2m1fn_x2 if four_bits else torch.float8_e4m3fn)


def _stored(values: Tensor, scales: Tensor, size: int, format: str) -> Tensor:
    """Return the scales of an operand for each row and each `size` columns, swizzled."""
    tall = values.shape[0] // scales.shape[0]
    rows, cols = values.shape[0], -(-values.shape[1] // _MULTIPLE) * _MULTIPLE // size
    each = scales.repeat_interleave(tall, 0) if tall > 1 else scales
    filled = F.pad(each, (0, cols - each.shape[1], 0, -rows % _MULTIPLE))
    dtype = torch.float8_e4m3fn if format == "nvfp4" else torch.float8_e8m0fnu
    return swizzle_scales(filled).view(dtype)


def _quantiser(values: Tensor, scales: Tensor, format: str) -> Quantiser:
    """Return what says which blocks lie in `values`."""
    block = (values.shape[0] // scales.shape[0], values.shape[1] // scales.shape[1])
    return Quantiser(format=format, block=block)  # type: ignore[arg-type]


def _multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    product: Tensor = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.float32)
    return product


def _mxfp4(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """`_multiply` of MXFP4, which only the second interface takes."""
    recipe, swizzle = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    return F.scaled_mm(
        a,
        b,
        scale_a=scale_a,
        scale_recipe_a=recipe,
        scale_b=scale_b,
        scale_recipe_b=recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.float32,
    )


@lru_cache
def passed_over(device: torch.device, format: Format) -> str | None:
    """Return why `block_scaled_mm` is not used on `device`, None if it is: a product is tried."""
    return refusal(device, NEEDED, format, lambda: wrong_product(device, format))


def wrong_product(device: torch.device, format: Format) -> str | None:
    """Return what is wrong with products of `device` beside fp64, None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    scale = "te214" if format == "nvfp4" else "rceil"
    quantiser = Quantiser(format=format, block=(1, BLOCKS[format]), scale=scale)
    spread = torch.randn(1, 160, generator=generator).exp()  # scales differ along rows
    a, b = (
        emulate((torch.randn(rows, 160, generator=generator) * spread).to(device), quantiser, 1)
        for rows in (48, 144)
    )
    assert a.folded is not None
    assert b.folded is not None
    factor = torch.full((), 0.75, device=device)
    exact = a.values.cpu().double() @ b.values.cpu().double().T * 0.75
    for fp32 in (False, True):
        product = block_scaled_mm(a.values, a.folded, b.values, b.folded, factor, format, fp32)
        error = float((product.cpu().double() - exact).norm() / exact.norm())
        if not error < 2**-7:  # one rounding to bf16 has up to 2**-8; NaN compares false
            return f"torch._scaled_mm: {format} is off by {error:.3f} of its norm"
    return None
