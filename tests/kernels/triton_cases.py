"""The Triton kernels against the eager references, bit for bit, on a device.

tests/kernels/test_triton.py runs these under Triton's interpreter, tests/gpu on a GPU.
"""

import torch
from torch import Tensor

from kernels.emulate import FUSED_HADAMARD
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.quantise import Block, quantise_nvfp4
from kernels.quantiser import Quantiser
from kernels.triton_nvfp4 import amax, dequantise, quantise, quantise_both
from tests.kernels.oracles import inputs

SHAPES = ((48, 112), (16, 64), (96, 16))  # fewer rows, columns than a tile, and more
BLOCKS: tuple[Block, ...] = ((1, 16), (16, 1), (16, 16))
HEADROOMS = (1.0, 17 / 16)


def check_quantise(kind: str, shape: tuple[int, int], device: torch.device) -> None:
    """Hold amax, `quantise` of every block, rounding and headroom, and `dequantise`.

    `kind` is one of `tests.kernels.oracles.KINDS`, or inf: normal numbers and an infinite one.
    """
    x, bits = _inputs(kind, shape, device), _dice(shape, 1, device)
    assert amax(x) == x.abs().max()
    if kind != "inf":
        packed = quantise_nvfp4(x)
        assert torch.equal(dequantise(*packed.packed(), packed.outer), packed.dequantise()), kind
    for block in BLOCKS:
        for dice in (None, bits):
            for headroom in HEADROOMS:
                found = quantise(x, block, dice, headroom=headroom)
                _check(found, x, block, dice, headroom, (kind, shape, block))


def check_quantise_both(kind: str, device: torch.device) -> None:
    """Hold both operands of a gradient, for each size of the transform that is fused."""
    for size in FUSED_HADAMARD:
        shape = (2 * size, 80)
        x, matrix = _inputs(kind, shape, device), hadamard_matrix(size, device=device)
        for dice in (None, (_dice(shape, 1, device), _dice(shape, 2, device))):
            rows, columns = quantise_both(x, matrix, dice)
            one, two = dice or (None, None)
            _check(rows, x, (1, 16), one, 1.0, (kind, size))
            _check(columns, hadamard(x, matrix, 0), (16, 1), two, 1.0, (kind, size))


def check_far_rows(device: torch.device) -> None:
    """Hold a matrix whose rows lie 2**26 bytes apart: the last begins 2**31 after the first."""
    far = torch.empty_strided((33, 64), (1 << 26, 1), dtype=torch.int8, device=device)
    far.zero_()
    far[32, 5] = 7
    assert amax(far) == 7
    values, _ = quantise(far, (1, 16))
    assert values[32, 5] != 0
    assert values.count_nonzero() == 1


def _inputs(kind: str, shape: tuple[int, int], device: torch.device) -> Tensor:
    x = inputs("normal" if kind == "inf" else kind, *shape)
    if kind == "inf":
        x[3, 5] = float("inf")
    return x.to(device)


def _dice(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def _check(
    found: tuple[Tensor, Tensor],
    x: Tensor,
    block: Block,
    bits: Tensor | None,
    headroom: float,
    where: object,
) -> None:
    wanted = Quantiser(format="nvfp4", block=block, sr_headroom=headroom)(x, bits)
    if torch.isnan(wanted.numerator):  # inf - inf in a transform: the product is NaN by its factor
        assert torch.isnan(found[1]), where
        return
    assert torch.equal(found[0], wanted.scaled().bfloat16()), where
    assert torch.equal(found[1], wanted.numerator), where
