"""Weights in the formats of post-training quantisation, bit by bit as they are stored.

    int     integers of 2 to 8 bits, a scale (and a zero point) in bf16 for each group
    fp8     E4M3 with a scale in fp32 for each row
    mxfp4, mxfp8   E2M1, E4M3 in blocks of 32 with E8M0 scales
    int8, nvfp4, nf4, nf4_single   see `kernels.frozen`

What is packed holds integers only, so that a cast of the model leaves it as it is.

Shape legend: rows, cols of the matrix.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.formats import E2M1, E4M3, decode, decode_e8m0, unpack
from kernels.frozen import Kind, Packed, pack_matrix, unpack_matrix
from kernels.integers import (
    IntegerGrid,
    code_range,
    integer_grid,
    pack_bits,
    ternary_grid,
    unpack_bits,
)
from kernels.quantise import pad_to_blocks, quantise_fp8, quantise_mx
from kernels.storage import Storage

_BLOCK = (1, 32)  # of the mx formats


def store(weight: Float[Tensor, "rows cols"], storage: Storage) -> Packed:
    """Return `weight` rounded to nearest, by the names of its parts."""
    weight, elements = weight.float(), storage.elements
    if elements == "int":
        grid = integer_grid(weight, storage.bits, storage.group, symmetric=storage.symmetric)
        return store_codes(grid, grid.codes(weight), storage)
    if elements == "ternary":
        grid = ternary_grid(weight, storage.group)
        return store_codes(grid, grid.codes(weight), storage)
    if elements == "fp8":
        rows = quantise_fp8(weight, block=(1, weight.shape[1]), powers_of_two=False)
        codes, scales = rows.packed()
        return {"codes": codes, "scales": scales.contiguous().view(torch.int32)}
    if elements in ("mxfp4", "mxfp8"):
        padded = pad_to_blocks(weight, _BLOCK)
        codes, scales = quantise_mx(padded, fmt=E2M1 if elements == "mxfp4" else E4M3).packed()
        return {"codes": codes, "scales": scales}
    return pack_matrix(weight, cast(Kind, elements))


def store_codes(grid: IntegerGrid, codes: Float[Tensor, "rows cols"], storage: Storage) -> Packed:
    """Return integers that a method has chosen, by the names of their parts."""
    unsigned = (codes - grid.low).to(torch.uint8)
    packed = {"codes": pack_bits(unsigned, storage.bits), "scales": _bf16_bits(grid.scales)}
    return packed if storage.symmetric else packed | {"zeros": _bf16_bits(grid.zeros)}


def restore(packed: Packed, storage: Storage, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
    """Return the fp32 matrix that `packed` stands for."""
    elements, codes = storage.elements, packed["codes"]
    if elements in ("int", "ternary"):
        return restored_grid(packed, storage, cols).values(restored_codes(packed, storage, cols))
    if elements == "fp8":
        return decode(codes, E4M3) * packed["scales"].view(torch.float32)
    if elements in ("mxfp4", "mxfp8"):
        values = decode(unpack(codes), E2M1) if elements == "mxfp4" else decode(codes, E4M3)
        blocks = values.view(rows, -1, _BLOCK[1]) * decode_e8m0(packed["scales"])[..., None]
        return blocks.flatten(1)[:, :cols]
    return unpack_matrix(packed, cast(Kind, elements), rows, cols)


def restored_grid(packed: Packed, storage: Storage, cols: int) -> IntegerGrid:
    """Return the grid of packed integers."""
    low, high = _range(storage)
    scales = _floats(packed["scales"])
    zeros = torch.zeros_like(scales) if storage.symmetric else _floats(packed["zeros"])
    return IntegerGrid(low, high, storage.group or cols, scales, zeros)


def restored_codes(packed: Packed, storage: Storage, cols: int) -> Float[Tensor, "rows cols"]:
    """Return the codes of packed integers."""
    return unpack_bits(packed["codes"], storage.bits, cols).float() + _range(storage)[0]


def _range(storage: Storage) -> tuple[int, int]:
    if storage.elements == "ternary":
        return -1, 1
    return code_range(storage.bits, symmetric=storage.symmetric)


def _bf16_bits(values: Tensor) -> Tensor:
    return values.bfloat16().contiguous().view(torch.int16)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.bfloat16).float()
