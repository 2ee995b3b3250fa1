"""Packed matrices: each format against its definition; the product's gradient is the matrix's."""

import pytest
import torch

from kernels.frozen import _NF4, Kind, pack_matrix, packed_product, unpack_matrix
from kernels.quantise import quantise_nvfp4

KINDS: tuple[Kind, ...] = ("nf4", "nvfp4", "int8")


def _matrix(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02


def test_nf4_is_the_nearest_quantile_times_a_scale_in_eight_bits() -> None:
    weight = _matrix(300, 130)
    weight[0] = 0.0
    packed = pack_matrix(weight, "nf4")
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = flat.abs().amax(dim=1).double()
    expected = []
    for start in range(0, len(scales), 256):  # double quantisation, 256 scales at a time
        centred = scales[start : start + 256] - scales.mean()
        step = centred.abs().max() / 127
        expected.append((centred / step).round() * step + scales.mean())
    table = torch.tensor(_NF4).double()
    relative = flat.double() / scales.clamp(min=1e-30)[:, None]
    nearest = (relative[..., None] - table).abs().argmin(dim=-1)
    oracle = (table[nearest] * torch.cat(expected)[:, None]).flatten()[: weight.numel()]
    torch.testing.assert_close(
        unpack_matrix(packed, "nf4", 300, 130).flatten().double(), oracle, rtol=1e-5, atol=1e-7
    )
    bits = 8 * sum(part.nbytes for part in packed.values()) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.01)


def test_nf4_has_the_bits_of_bitsandbytes() -> None:
    theirs = pytest.importorskip(
        "bitsandbytes.functional", reason="the format's own package: pip install bitsandbytes"
    )
    weight = _matrix(96, 128)
    codes, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed = pack_matrix(weight, "nf4_single")
    assert torch.equal(state.absmax, packed["scales"].view(torch.float32))
    ours = packed["codes"].flatten()  # the first of two in the low half, theirs in the high one
    assert torch.equal((ours & 15) << 4 | ours >> 4, codes.flatten())
    restored = unpack_matrix(packed, "nf4_single", 96, 128)
    assert torch.equal(restored, theirs.dequantize_4bit(codes, state))


def test_nvfp4_and_int8_stand_for_what_their_quantisers_give() -> None:
    weight = _matrix(48, 80)
    nvfp4 = unpack_matrix(pack_matrix(weight, "nvfp4"), "nvfp4", 48, 80)
    torch.testing.assert_close(nvfp4, quantise_nvfp4(weight).dequantise(), rtol=1e-6, atol=0)
    int8 = unpack_matrix(pack_matrix(weight, "int8"), "int8", 48, 80)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((int8 - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(unpack_matrix(pack_matrix(weight * 0, "int8"), "int8", 48, 80), weight * 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [64, 70])
def test_the_product_and_its_gradient_are_those_of_the_matrix(kind: Kind, cols: int) -> None:
    packed = pack_matrix(_matrix(33, cols), kind)
    assert all(not part.is_floating_point() for part in packed.values())
    weight = unpack_matrix(packed, kind, 33, cols)
    x = _matrix(10, cols).view(2, 5, cols).requires_grad_()
    y = packed_product(x, packed, kind, 33)
    assert torch.equal(y, x @ weight.T)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad((x @ weight.T).square().sum(), x)
    torch.testing.assert_close(grad, expected)
