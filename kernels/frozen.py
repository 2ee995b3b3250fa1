"""Matrices that are never trained, in 4 or 8 bits, and the product with them.

    nf4     4-bit NormalFloat in blocks of 64 along the rows, their scales in 8 bits (QLoRA's double
            quantisation, arXiv 2305.14314): 4.13 bits a weight
    nf4_single  the same with scales in fp32: 4.5 bits
    nvfp4   E2M1 in blocks of 16 with E4M3 scales: 4.5 bits
    int8    a scale for each row: 8 bits

What is packed holds integers only, so that a cast of the model leaves it as it is.

Shape legend: rows, cols of the matrix.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.formats import E2M1, E4M3, decode, pack, unpack
from kernels.quantise import pad_to_blocks, quantise_nvfp4

Kind = Literal["nf4", "nf4_single", "nvfp4", "int8"]
Packed = dict[str, Tensor]
_NF4 = (  # quantiles of the normal distribution, with an exact 0: appendix E of the paper
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_BLOCK, _SCALES = 64, 256  # weights with one scale; scales with one scale of theirs


def pack_matrix(weight: Float[Tensor, "rows cols"], kind: Kind) -> Packed:
    """Return a matrix in the form of `kind`, by the names of its parts."""
    weight = weight.float()
    if kind in ("nf4", "nf4_single"):
        return _pack_nf4(weight, double=kind == "nf4")
    if kind == "nvfp4":
        quantised = quantise_nvfp4(pad_to_blocks(weight, (1, 16)))
        codes, scales = quantised.packed()
        return {"codes": codes, "scales": scales, "outer": _bits(quantised.outer)}
    scales = weight.abs().amax(dim=1, keepdim=True) / 127.0
    codes = torch.where(scales > 0, weight / scales, 0.0).round().to(torch.int8)
    return {"codes": codes, "scales": _bits(scales)}


def unpack_matrix(packed: Packed, kind: Kind, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
    """Return the fp32 matrix that `packed` stands for."""
    if kind in ("nf4", "nf4_single"):
        return _unpack_nf4(packed)[: rows * cols].view(rows, cols)
    if kind == "int8":
        return packed["codes"].float() * _floats(packed["scales"])
    elements = decode(unpack(packed["codes"]), E2M1)
    blocks = elements.view(rows, -1, 16) * decode(packed["scales"], E4M3)[..., None]
    full: Tensor = (blocks.flatten(1) * _floats(packed["outer"]))[:, :cols]
    return full


def packed_product(
    x: Float[Tensor, "*batch cols"], packed: Packed, kind: Kind, rows: int
) -> Float[Tensor, "*batch rows"]:
    """Return x @ weight.T; the matrix is unpacked again in the backward pass, not kept."""
    result: Tensor = _Product.apply(x, kind, rows, tuple(packed), *packed.values())  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: Kind, rows: int, names: tuple[str, ...], *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.kind, ctx.names, ctx.shape, ctx.dtype = kind, names, (rows, x.shape[-1]), x.dtype
        return F.linear(x, _matrix(ctx, parts, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        matrix = _matrix(ctx, ctx.saved_tensors, grad.dtype)
        return (grad @ matrix).to(ctx.dtype), None, None, None, *[None] * len(ctx.names)


def _matrix(ctx: Any, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    packed = dict(zip(ctx.names, parts, strict=True))
    return unpack_matrix(packed, ctx.kind, *ctx.shape).to(dtype)


def _pack_nf4(weight: Tensor, *, double: bool) -> Packed:
    rows, cols = weight.shape
    blocks = F.pad(weight.flatten(), (0, -rows * cols % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1)
    packed = _double(scales) if double else {"scales": _bits(scales)}
    table = torch.tensor(_NF4, device=weight.device)
    # To the nearest value relative to the scale as found; a tie goes down.
    relative = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0.0)
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2, out_int32=True)
    return {"codes": pack(codes.to(torch.uint8)), **packed}


def _double(scales: Tensor) -> Packed:
    """Return scales in 8 bits around their mean."""
    mean = scales.mean()
    centred = F.pad(scales - mean, (0, -len(scales) % _SCALES)).view(-1, _SCALES)
    step = centred.abs().amax(dim=1, keepdim=True) / 127.0
    small = torch.where(step > 0, centred / step, 0.0).round().to(torch.int8)
    return {"scales": small.flatten()[: len(scales)], "steps": _bits(step), "mean": _bits(mean)}


def _unpack_nf4(packed: Packed) -> Tensor:
    table = torch.tensor(_NF4, device=packed["codes"].device)
    if "steps" in packed:
        scales = packed["scales"].float()
        steps = _floats(packed["steps"]).flatten().repeat_interleave(_SCALES)[: len(scales)]
        scales = scales * steps + _floats(packed["mean"])
    else:
        scales = _floats(packed["scales"])
    return (table[unpack(packed["codes"]).long()] * scales[:, None]).flatten()


def _bits(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)
