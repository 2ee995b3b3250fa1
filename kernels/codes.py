"""A quantised operand as its codes and scales: 4.5 bits an element of NVFP4, 8.25 of MXFP8.

So an activation is kept for a backward pass that reads it quantised. The operand comes back bit for
bit: elements x scales are exact in bf16, and so is the quotient that gives the elements back.

Shape legend: rows, cols of the operand, which its GEMM sums over columns.
"""

import torch
from torch import Tensor

from kernels.emulate import Operand, has_triton
from kernels.formats import (
    E1M2,
    E2M1,
    E4M3,
    FloatFormat,
    decode,
    decode_e8m0,
    encode,
    pack,
)
from kernels.quantise import as_blocks
from kernels.quantiser import Quantiser

# Codes, numerator, scales apart and bytes of folded scales, see `Operand`.
Codes = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
_FOUR_BITS = (E2M1, E1M2)


def pack_operand(operand: Operand, quantiser: Quantiser) -> Codes:
    """Return `operand` as codes, two of four bits a byte, and scales.

    Args:
        quantiser: what has made it, summed over columns.
    """
    return (
        pack_elements(operand.values, operand.folded, quantiser),
        operand.numerator,
        operand.scales,
        operand.folded,
    )


def unpack_operand(codes: Codes, quantiser: Quantiser) -> Operand:
    """Return the operand of `pack_operand`, bit for bit."""
    packed, numerator, scales, folded = codes
    if folded is not None and quantiser.format == "nvfp4" and has_triton(packed.device):
        values = torch.ops.espalier.expand_nvfp4(packed, folded, list(quantiser.block))
    else:
        values = _elements(packed, quantiser.elements)
        if folded is not None and quantiser.folds:
            blocks = as_blocks(values, quantiser.block)
            of_blocks = _folded_scales(folded, quantiser)
            values = (blocks * of_blocks[:, None, :, None]).view(values.shape)
    block = quantiser.apart or quantiser.block
    return Operand(values, numerator, quantiser.denominator, scales, block, folded)


def pack_elements(values: Tensor, folded: Tensor | None, quantiser: Quantiser) -> Tensor:
    """Return the codes of an operand's `values`, bytes or (four bits) pairs of columns.

    Args:
        folded: bytes of the scales that `values` contain.
        quantiser: along the dimension that blocks lie in.
    """
    if folded is not None and quantiser.folds:
        scales = _folded_scales(folded, quantiser)
        usable = torch.where(scales == 0, 1.0, scales)[:, None, :, None]
        values = (as_blocks(values, quantiser.block) / usable).view(values.shape)
    codes = encode(values, quantiser.elements)
    return pack(codes) if quantiser.elements in _FOUR_BITS else codes


@torch.library.custom_op("espalier::expand_nvfp4", mutates_args=())
def _expand_nvfp4(codes: Tensor, scales: Tensor, block: list[int]) -> Tensor:
    from kernels import triton_nvfp4  # noqa: PLC0415

    return triton_nvfp4.expand(codes, scales, (block[0], block[1]))


@_expand_nvfp4.register_fake
def _(codes: Tensor, scales: Tensor, block: list[int]) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1] * 2, dtype=torch.bfloat16)


def _folded_scales(folded: Tensor, quantiser: Quantiser) -> Tensor:
    """Return the scales of blocks in bf16, where all of them are exact."""
    e8m0 = quantiser.format.startswith(("mx", "fp8"))
    return (decode_e8m0(folded) if e8m0 else decode(folded, E4M3)).to(torch.bfloat16)


def _elements(packed: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the elements of `packed` codes in bf16."""
    if fmt not in _FOUR_BITS:
        return decode(packed, fmt).to(torch.bfloat16)
    byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    pairs = torch.stack((decode(byte & 0xF, fmt), decode(byte >> 4, fmt)), dim=1)
    table = pairs.to(torch.bfloat16).view(torch.int32).flatten()  # a pair is one number to copy
    chosen = table.index_select(0, packed.flatten().int())
    return chosen.view(torch.bfloat16).view(packed.shape[0], -1)
