"""Quantisers equal the published implementations byte for byte, but for known differences."""

from typing import Any

import pytest
import torch

from kernels.formats import E2M1, E4M3, E5M2, encode
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.quantise import Quantised, pad_to_blocks, quantise_fp8, quantise_mx, quantise_nvfp4
from tests.kernels.oracles import KINDS, inputs, te_reference

TE = te_reference()


def _te(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and scale bytes of TransformerEngine's reference, row-wise."""
    quantiser = TE.NVFP4QuantizerRef(dtype=None, columnwise=False, **options)
    codes, scales = quantiser._quantize(x)[:2]
    return codes, scales.view(torch.uint8)


def _bytes(found: Quantised, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = found.packed()
    return codes, scales.repeat_interleave(rows // scales.shape[0], dim=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("block", "ours", "theirs"),
    [
        ((1, 16), {}, {}),
        ((16, 16), {}, {}),
        ((1, 16), {"row_scaled": True}, {"row_scaled_nvfp4": True}),
        *(
            (
                block,
                {"four_over_six": error, "e4m3_max": largest},
                {
                    "nvfp4_use_4over6": True,
                    "nvfp4_4over6_err_mode": error.upper(),
                    "nvfp4_e4m3_max": largest,
                },
            )
            for block in ((1, 16), (16, 16))
            for error in ("mae", "mse")
            for largest in (448, 256)
        ),
    ],
    ids=lambda value: "-".join(map(str, getattr(value, "values", lambda: value)())),
)
def test_nvfp4_is_transformer_engines_bit_for_bit(
    kind: str, block: tuple[int, int], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    x = inputs(kind)
    codes, scales = _te(x, quant_tile_shape=block, **theirs)
    got = _bytes(quantise_nvfp4(x, block=block, **ours), x.shape[0])
    assert torch.equal(got[1], scales)
    assert torch.equal(got[0], codes)


@pytest.mark.parametrize("kind", KINDS)
def test_columnwise_with_hadamard_is_transformer_engines(kind: str) -> None:
    x = inputs(kind)
    quantiser = TE.NVFP4QuantizerRef(dtype=None, rowwise=False, with_rht=True)
    _, _, codes, scales, _, amax = quantiser._quantize(x)
    turned = hadamard(x, hadamard_matrix(16), dim=0)
    found = quantise_nvfp4(turned, block=(16, 1))
    assert torch.equal(found.numerator.view(1), torch.where(amax == 0, 2688.0, amax))
    assert torch.equal(encode(found.scales.T.contiguous(), E4M3), scales.view(torch.uint8))
    mine = encode(found.elements.T.contiguous(), E2M1)
    assert torch.equal(mine[:, ::2] | (mine[:, 1::2] << 4), codes)


@pytest.mark.parametrize(("amax", "differs"), [(3.9375, True), (4.375, True), (4.0, False)])
def test_paper_order_differs_where_block_scales_are_ties(amax: float, differs: bool) -> None:
    """The second rounding decides ties of E4M3, which bf16 magnitudes meet at some amax."""
    x = inputs("normal", 1024, 1024).clamp(-amax, amax)
    x[0, 0] = amax
    new, old = (quantise_nvfp4(x, order=order).packed()[0] for order in ("te214", "paper"))
    share = float((new != old).float().mean())
    assert (1e-4 < share < 2e-2) if differs else share == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["floor", "rceil", "ceil", "even"])
@pytest.mark.parametrize("fmt", [E2M1, E4M3, E5M2], ids=lambda f: f.name)
def test_mx_is_torchaos_to_mx(kind: str, mode: str, fmt) -> None:  # type: ignore[no-untyped-def]
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = inputs(kind)
    dtype = {E2M1: torch.float4_e2m1fn_x2, E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[fmt]
    scales, codes = to_mx(x, dtype, 32, ScaleCalculationMode(mode))
    got = quantise_mx(x, fmt=fmt, scale_rounding=mode).packed()
    assert torch.equal(got[1], scales.view(torch.uint8))
    nonzero = got[0] if fmt is E2M1 else torch.where(got[0] == 0x80, 0, got[0])
    theirs = codes.view(torch.uint8).view(x.shape[0], -1)
    assert torch.equal(nonzero, theirs if fmt is E2M1 else torch.where(theirs == 0x80, 0, theirs))


def test_torchaos_nvfp4_differs_by_its_documented_clamp() -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = inputs("normal", 1024, 1024)
    scales, codes = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max().float()))
    mine, my_scales = quantise_nvfp4(x).packed()
    assert (my_scales != scales.view(torch.uint8).view(my_scales.shape)).float().mean() < 1e-3
    assert 0 < (mine != codes.view(torch.uint8).view(mine.shape)).float().mean() < 0.03


@pytest.mark.parametrize(
    ("found", "rmse"),
    [
        (lambda x: quantise_nvfp4(x), 0.0952),
        (lambda x: quantise_nvfp4(x, block=(16, 16)), 0.1114),
        (lambda x: quantise_nvfp4(x, four_over_six="mae"), 0.0884),
        (lambda x: quantise_mx(x, scale_rounding="floor"), 0.1148),
    ],
    ids=["nvfp4", "16x16", "4over6", "mxfp4"],
)
def test_relative_error_on_a_gaussian_is_the_published_one(found, rmse: float) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = (
        found(x).dequantise() - x.float()
    ).square().mean().sqrt() / x.float().square().mean().sqrt()
    assert abs(float(error) - rmse) < 0.0003  # three standard errors of a million elements


def test_zeros_underflow_inf_and_nan() -> None:
    zero = quantise_nvfp4(torch.zeros(2, 32))
    assert not zero.dequantise().any()
    assert not zero.packed()[0].any()
    x = torch.ones(1, 32)
    x[0, :16] = 1e-9  # this block's scale underflows beside the other's
    x[0, 3] = 0.0
    tiny = quantise_nvfp4(x)
    assert tiny.scales[0, 0] == 0
    assert set(tiny.elements[0, :16].tolist()) == {6.0, 0.0}
    assert not tiny.dequantise()[0, :16].any()
    x[0, 5] = float("inf")
    assert quantise_nvfp4(x).scales[0].tolist() == [448.0, 0.171875]
    x[0, 5] = float("nan")
    assert quantise_nvfp4(x).dequantise().isnan().any()
    for fp8 in (quantise_fp8(torch.zeros(2, 32)), quantise_fp8(torch.zeros(2, 32), block=(1, 32))):
        assert not fp8.dequantise().any()


def test_ragged_sizes_are_refused_with_the_size_or_padded() -> None:
    x = torch.randn(3, 20)
    with pytest.raises(
        ValueError, match="cols=20 is not a multiple of the block size 16; pad to 32"
    ):
        quantise_nvfp4(x)
    with pytest.raises(ValueError, match="rows=3 is not a multiple of the block size 16"):
        quantise_nvfp4(x, block=(16, 1))
    padded = quantise_nvfp4(pad_to_blocks(x, (1, 16))).dequantise()
    assert padded.shape == (3, 32)
    assert not padded[:, 20:].any()


def test_adaptive_scale_saturates_what_lies_above_it() -> None:
    x = inputs("outliers").float()
    amax = torch.quantile(x.abs().flatten(), 0.98)
    found = quantise_nvfp4(x, amax=amax)
    assert found.scales.max() == 448.0
    assert (found.dequantise().abs() <= 448 * 6 * found.outer).all()


def test_stochastic_headroom_removes_the_clamp_of_gaussian_blocks() -> None:
    x = inputs("normal", 512, 512).float()
    means = []
    for headroom in (1.0, 17 / 16):
        total = torch.zeros_like(x)
        for seed in range(64):
            bits = torch.randint(
                0, 256, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
            )
            total += quantise_nvfp4(x, bits=bits, sr_headroom=headroom).dequantise()
        top = x.abs() >= x.view(512, 32, 16).abs().amax(-1, keepdim=True).expand(
            -1, -1, 16
        ).reshape(x.shape)
        means.append(float(((total / 64 - x) * x.sign())[top].mean()))
    assert means[0] < -0.01  # block maxima are pulled down
    assert abs(means[1]) < 0.3 * abs(means[0])


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("signs", ["fixed", "random", "none"])
def test_hadamard_keeps_the_product_and_spreads_an_outlier(size: int, signs: Any) -> None:
    matrix = hadamard_matrix(size, signs, seed=3).float()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=size * 2.0**-8)
    spike = torch.zeros(4, size)
    spike[:, 5] = 8.0
    for dim, tensor in ((1, spike), (0, spike.T.contiguous())):
        turned = hadamard(tensor, hadamard_matrix(size, signs, seed=3), dim).float()
        assert turned.abs().max() <= 8.0 / size**0.5 * 1.01


def test_hadamard_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="hadamard=24 is none of 16, 32, 64, 128"):
        hadamard_matrix(24)
    with pytest.raises(ValueError, match="size 20 along dim 1 is not a multiple of hadamard=16"):
        hadamard(torch.zeros(2, 20), hadamard_matrix(16), 1)


def test_blockwise_fp8_scales_are_powers_of_two_or_exact() -> None:
    x = inputs("lognormal").float()
    for block in ((1, 128), (128, 128)):
        two = quantise_fp8(x, block=block)
        assert torch.equal(torch.frexp(two.scales)[0], torch.full_like(two.scales, 0.5))
        exact = quantise_fp8(x, block=block, powers_of_two=False)
        blocks = x.view(128 // block[0], block[0], 256 // block[1], block[1])
        assert torch.allclose(exact.scales * 448, blocks.abs().amax((1, 3)), rtol=1e-6)
        assert exact.elements.abs().max() == 448
        assert two.elements.abs().max() <= 448


def test_at_256_the_largest_block_too_has_the_choice_of_four_over_six() -> None:
    """Fifteen 4.5 and a 6: scales for a maximum of 4 are exact, but at 448 the scale is clamped."""
    x = torch.full((1, 16), 4.5)
    x[0, 3] = 6.0
    exact, clamped = (quantise_nvfp4(x, four_over_six="mae", e4m3_max=m) for m in (256, 448))
    assert torch.equal(exact.dequantise(), x)
    assert float((clamped.dequantise() - x).abs().sum()) == pytest.approx(7.5)
