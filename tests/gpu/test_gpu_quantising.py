"""The Triton kernels compiled for this GPU equal the eager references bit for bit.

In a rehearsal Triton's interpreter runs them (TRITON_INTERPRET=1), on fewer inputs.
"""

import pytest
import torch

from kernels import hadamard, logit_rows, operand_pairs, philox
from kernels.emulate import has_triton
from kernels.quantiser import Quantiser
from kernels.triton_check import triton_agrees
from tests.gpu.device import CPU, DEVICE, HAS_GPU, needs_gpu
from tests.kernels import oracles

pytestmark = needs_gpu
pytest.importorskip("triton", reason="needs triton")
KINDS = (*oracles.KINDS, "inf") if HAS_GPU else ("ties",)
LARGE = (4096, 1008) if HAS_GPU else (32, 48)  # no multiple of a tile


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_is_the_reference_bit_for_bit(kind: str) -> None:
    from tests.kernels.triton_cases import SHAPES, check_quantise

    for shape in (*SHAPES, LARGE) if HAS_GPU else (LARGE,):
        check_quantise(kind, shape, DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_transform_is_the_reference_bit_for_bit(kind: str) -> None:
    from tests.kernels.triton_cases import check_hadamard

    check_hadamard(kind, DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_formats_of_blocks_are_the_reference_bit_for_bit(kind: str) -> None:
    from tests.kernels.triton_cases import check_blocks, check_float8

    check_blocks(kind, DEVICE)
    check_float8(kind, DEVICE)


def test_random_words_are_the_reference_bit_for_bit() -> None:
    from tests.kernels.triton_cases import check_words

    check_words(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_both_operands_of_a_gradient_are_the_reference_bit_for_bit(kind: str) -> None:
    from tests.kernels.triton_cases import check_quantise_both

    check_quantise_both(kind, DEVICE)


def test_offsets_beyond_2_gib_are_right() -> None:
    from tests.kernels.triton_cases import check_far_rows

    check_far_rows(DEVICE)


@pytest.mark.skipif(not HAS_GPU, reason="the CPU quantises without Triton")
def test_the_kernels_are_taken() -> None:
    assert has_triton(DEVICE)
    modules = (hadamard, logit_rows, operand_pairs, philox)
    assert all(triton_agrees(DEVICE, module._compare) for module in modules)


def test_losses_by_rows_are_those_of_torch() -> None:
    from tests.kernels.triton_cases import check_losses

    check_losses(DEVICE)


@pytest.mark.parametrize("kind", [*oracles.KINDS, "inf"])
@pytest.mark.parametrize(
    "quantiser",
    [
        Quantiser(format="nvfp4", block=(1, 16), scale="paper"),
        Quantiser(format="nvfp4", block=(1, 16), row_scaled=True),
        Quantiser(format="nvfp4", block=(1, 16), four_over_six="mse", e4m3_max=256),
        Quantiser(format="mxfp4", block=(1, 32), scale="floor", element_headroom=4 / 3),
        Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
        Quantiser(format="fp8_e5m2", block=(0, 0), scale="current"),
        Quantiser(format="fp8_e4m3", block=(128, 128), scale="power_of_two"),
        Quantiser(format="fp8_e4m3", block=(1, 128), scale="fp32"),
    ],
    ids=lambda q: f"{q.format} {q.scale} {q.block}",
)
def test_eager_references_give_the_bits_of_the_cpu(kind: str, quantiser: Quantiser) -> None:
    """NaN where the CPU has NaN: an infinite maximum leaves some formats no scale."""
    x = oracles.inputs("normal" if kind == "inf" else kind, 128, 256)
    if kind == "inf":
        x[3, 5] = float("inf")
    parts = []
    for device in (CPU, DEVICE):
        quantised = quantiser(x.to(device))
        parts.append([t.cpu().float() for t in (quantised.scaled(), quantised.numerator)])
    for cpu, gpu in zip(*parts, strict=True):
        assert torch.equal(cpu.nan_to_num(nan=1.5e38), gpu.nan_to_num(nan=1.5e38))
