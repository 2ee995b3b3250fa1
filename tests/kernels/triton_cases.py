"""The Triton kernels against the eager references, bit for bit, on a device.

tests/kernels/test_triton.py runs these under Triton's interpreter, tests/gpu on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import cross_entropy, logit_rows
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from kernels.emulate import _by_triton, _reference
from kernels.float8_mm import FORMATS
from kernels.format_names import HADAMARD_SIZES
from kernels.hadamard import eager_transform, hadamard, hadamard_matrix
from kernels.operand_pairs import FUSED_HADAMARD
from kernels.philox import Dice, Draw, eager_bits
from kernels.quantise import Block, quantise_nvfp4
from kernels.quantiser import Quantiser
from kernels.triton_blocks import quantise_float8
from kernels.triton_hadamard import hadamard as triton_hadamard
from kernels.triton_nvfp4 import amax, expand, quantise, quantise_both
from kernels.triton_philox import words
from tests.kernels.oracles import inputs

SHAPES = ((48, 112), (16, 64), (96, 16))  # fewer rows, columns than a tile, and more
BLOCKS: tuple[Block, ...] = ((1, 16), (16, 1), (16, 16))
BLOCK_QUANTISERS = [
    *(
        Quantiser(format="mxfp4", block=block, scale=rule, element_headroom=grow)
        for block in ((1, 32), (32, 1), (32, 32))
        for rule, grow in (("rceil", 1.0), ("floor", 4 / 3), ("ceil", 1.0), ("even", 1.0))
    ),
    Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
    Quantiser(format="mxfp8_e5m2", block=(32, 1), scale="floor"),
    *(
        Quantiser(format="fp8_e4m3", block=block, scale=rule)
        for block in ((1, 128), (128, 1), (128, 128))
        for rule in ("power_of_two", "fp32")
    ),
    Quantiser(format="fp8_e4m3", block=(0, 0)),
    Quantiser(format="fp8_e5m2", block=(0, 0)),
]


def check_words(device: torch.device) -> None:
    """Hold the random words of samples beyond 32 bits, of negative seeds and large streams."""
    for key, stream in (([1, 2], 3), ([-5, -(2**31)], 2**31 - 1)):
        dice = _dice([0, 7, 2**31 + 5, 2**40 + 1], device, key)
        for blocks in (3, 300):
            drawn = words(dice.samples, dice.key, stream, blocks).view(torch.uint8)
            assert torch.equal(drawn.flatten(), eager_bits(dice, stream, 4 * blocks, 16).flatten())


def check_hadamard(kind: str, device: torch.device) -> None:
    """Hold the transform of both dimensions, in every size."""
    for size in HADAMARD_SIZES:
        signs = hadamard_matrix(size, "random", 3, device)[:, 0].contiguous()
        for shape, dim in (((2 * size, 80), 0), ((24, size), 1)):
            x = _inputs(kind, shape, device)
            found, wanted = triton_hadamard(x, signs, dim), eager_transform(x, signs, dim)
            assert torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)), (kind, size)


def check_quantise(kind: str, shape: tuple[int, int], device: torch.device) -> None:
    """Hold amax, `quantise` of every block, rounding and headroom, and `expand`.

    `kind` is one of `tests.kernels.oracles.KINDS`, or inf: normal numbers and an infinite one.
    """
    x = _inputs(kind, shape, device)
    # The last rows are padding: their dice are 0.
    draw = Draw(_dice([4, 2**40], device), 3, shape[0] - 2)
    assert amax(x) == x.abs().max()
    for block in BLOCKS:
        packed = quantise_nvfp4(x, block=block)
        assert torch.equal(expand(*packed.packed(), block), packed.scaled().bfloat16()), kind
        for chosen, headroom in ((None, 1.0), (draw, 17 / 16)):
            found = quantise(x, block, chosen, headroom=headroom)
            _check(found, x, block, chosen, headroom, (kind, shape, block))


def check_blocks(kind: str, device: torch.device) -> None:
    """Hold MXFP4, MXFP8 and FP8 in every block, rule and rounding that a recipe may choose."""
    large, draw = _inputs(kind, (128, 256), device), Draw(_dice([4, 2**40], device), 3, 62)
    if kind == "zeros":
        large[3, 5] = float("nan")
    for quantiser in BLOCK_QUANTISERS:
        x = large if max(quantiser.block) == 128 else large[:64, :96]
        for chosen in (None, draw) if quantiser.format == "mxfp4" else (None,):
            made = _by_triton(quantiser, x, chosen, None)
            assert made is not None
            bits = None if chosen is None else chosen.bits(*x.shape)
            for found, wanted in zip(made, _reference(quantiser, x, bits, None), strict=True):
                same = torch.equal(found.nan_to_num(nan=1.5e38), wanted.nan_to_num(nan=1.5e38))
                assert same, (kind, quantiser)


def check_quantise_both(kind: str, device: torch.device) -> None:
    """Hold both operands of a matrix, for each size of the transform and without one (0)."""
    for size in (0, *FUSED_HADAMARD):
        shape = (2 * size or 48, 80)
        x, dice = _inputs(kind, shape, device), _dice([4, 2**40], device)
        matrix = hadamard_matrix(size, device=device) if size else None
        turned = x if matrix is None else hadamard(x, matrix, 0)
        for draws in (None, (Draw(dice, 1, shape[0]), Draw(dice, 2, shape[0]))):
            rows, columns = quantise_both(x, matrix, draws)
            one, two = draws or (None, None)
            _check(rows, x, (1, 16), one, 1.0, (kind, size))
            _check(columns, turned, (16, 1), two, 1.0, (kind, size))
            _, (codes, numerator, scales) = quantise_both(x, matrix, draws, keep=True)
            kept = expand(codes, scales, (16, 1))
            assert torch.equal(numerator.nan_to_num(), columns[1].nan_to_num()), (kind, size)
            if not torch.isnan(numerator):
                assert torch.equal(kept, columns[0]), (kind, size)


def check_float8(kind: str, device: torch.device) -> None:
    """Hold the bytes of FP8 with one scale, along rows and along columns."""
    x = _inputs(kind, (48, 112), device)
    for format, dtype in FORMATS.items():
        quantiser = Quantiser(format=format, block=(0, 0))  # type: ignore[arg-type]
        for largest in (None, torch.full((), 2.5, device=device)):
            wanted = quantiser(x, None, largest)
            made = quantise_float8(x, quantiser.elements, largest, rows=True, columns=True)
            for found, values in zip(made, (wanted.elements, wanted.elements.T), strict=False):
                decoded = found.view(dtype).float().nan_to_num(nan=7.0)
                assert torch.equal(decoded, values.nan_to_num(nan=7.0)), (kind, format)
            assert torch.equal(made[2], wanted.numerator), (kind, format)
            alone = quantise_float8(x, quantiser.elements, largest, rows=False, columns=True)
            assert torch.equal(alone[1], made[1])
            assert not alone[0].numel()


def check_losses(device: torch.device) -> None:
    """Hold losses of several chunks and their gradients to the eager rows, compiled ones too.

    fp32 sums in another order: 1e-5 of the largest value.
    """
    logit_rows._compare(device)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator).to(device) for n in (7, 11))
    targets = torch.tensor([3, IGNORE, 10, 0, 5, 5, IGNORE], device=device)

    def losses(function: Any, weights: Any) -> list[Tensor]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, nll = function(x, w, targets, scale=0.7, softcap=4.0, z_loss=0.1, weights=weights)
        total.backward()
        return [total.detach(), nll, x.grad, w.grad]

    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    before = cross_entropy._FUSED_BYTES, logit_rows._has_kernels
    try:
        for weights in (_by_likelihood, None, torch.rand(7, generator=generator).to(device)):
            logit_rows._has_kernels = lambda device: False
            wanted = losses(linear_cross_entropy, weights)
            cross_entropy._FUSED_BYTES = 3 * 11 * 4
            logit_rows._has_kernels = lambda device: True
            for function in (linear_cross_entropy, compiled):
                for found, right in zip(losses(function, weights), wanted, strict=True):
                    assert float((found - right).abs().max()) < 1e-5 * float(right.abs().max())
    finally:
        cross_entropy._FUSED_BYTES, logit_rows._has_kernels = before


def _by_likelihood(nll: Tensor, rows: Tensor) -> Tensor:
    return nll / 2 + rows


def check_far_rows(device: torch.device) -> None:
    """Hold a matrix whose rows lie 2**26 bytes apart: the last begins 2**31 after the first."""
    far = torch.empty_strided((33, 64), (1 << 26, 1), dtype=torch.int8, device=device)
    far.zero_()
    far[32, 5] = 7
    assert amax(far) == 7
    values, *_ = quantise(far, (1, 16))
    assert values[32, 5] != 0
    assert values.count_nonzero() == 1


def _inputs(kind: str, shape: tuple[int, int], device: torch.device) -> Tensor:
    x = inputs("normal" if kind == "inf" else kind, *shape)
    if kind == "inf":
        x[3, 5] = float("inf")
    return x.to(device)


def _dice(samples: list[int], device: torch.device, key: list[int] | None = None) -> Dice:
    words = torch.tensor(key or [11, 12], dtype=torch.int32, device=device)
    return Dice(torch.tensor(samples, device=device), words)


def _check(
    found: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    block: Block,
    draw: Draw | None,
    headroom: float,
    where: object,
) -> None:
    bits = None if draw is None else draw.bits(*x.shape)
    wanted = Quantiser(format="nvfp4", block=block, sr_headroom=headroom)(x, bits)
    if torch.isnan(wanted.numerator):  # inf - inf in a transform: the product is NaN by its factor
        assert torch.isnan(found[1]), where
        return
    assert torch.equal(found[0], wanted.scaled().bfloat16()), where
    assert torch.equal(found[1], wanted.numerator), where
    assert torch.equal(found[2], wanted.packed()[1]), where
