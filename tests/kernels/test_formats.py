"""Every code of every format, every tie, against ml_dtypes and torch's own casts."""

import ml_dtypes
import numpy as np
import pytest
import torch

from kernels.formats import (
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    decode,
    decode_e8m0,
    encode,
    encode_e8m0,
    encode_positive_e4m3,
    pack,
    round_nearest,
    round_scale,
    round_stochastic_e2m1,
    unpack,
)

DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def _finite_codes(name: str) -> torch.Tensor:
    codes = torch.arange(16 if name == "e2m1" else 256, dtype=torch.uint8)
    values = torch.from_numpy(codes.numpy().view(DTYPES[name]).astype(np.float32))
    return codes[values.isfinite()]


@pytest.mark.parametrize("name", DTYPES)
def test_codes_decode_as_in_ml_dtypes_and_encode_back(name: str) -> None:
    codes = _finite_codes(name)
    oracle = torch.from_numpy(codes.numpy().view(DTYPES[name]).astype(np.float32))
    values = decode(codes, FORMATS[name])
    assert torch.equal(values, oracle)
    assert torch.equal(encode(values, FORMATS[name]), codes)
    assert torch.equal(round_nearest(values, FORMATS[name]), values)


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_nearest_even_between_all_neighbours(name: str) -> None:
    values = decode(_finite_codes(name), FORMATS[name]).unique()
    middle = (values[1:].double() + values[:-1].double()).float() / 2
    around = torch.cat(
        [middle, torch.nextafter(middle, values[1:]), torch.nextafter(middle, values[:-1]), values]
    )
    oracle = torch.from_numpy(around.numpy().astype(DTYPES[name]).astype(np.float32))
    assert torch.equal(round_nearest(around, FORMATS[name]), oracle)


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_random_numbers_agrees_with_brute_force_in_fp64(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.randn(2000) * 2.0 ** torch.randint(fmt.emin - 3, fmt.emax + 2, (2000,))
    values = decode(_finite_codes(name), fmt).double().unique()
    distance = (x.double()[:, None] - values).abs()
    assert torch.equal((round_nearest(x, fmt).double() - x.double()).abs(), distance.amin(dim=1))


def test_beyond_the_range_saturates_and_nan_stays() -> None:
    for fmt in FORMATS.values():
        x = torch.tensor([fmt.max * 1.5, float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
        got = round_nearest(x, fmt)
        assert got[:3].tolist() == [fmt.max, fmt.max, -fmt.max]
        assert got[3].isnan()
        assert not got[4:].any()


def test_packing_puts_the_even_element_low_and_refuses_odd_sizes() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack(pack(codes)), codes)
    with pytest.raises(ValueError, match="cols=3 must be even"):
        pack(codes[:, :3])


def test_e8m0_bytes_are_those_of_ml_dtypes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    oracle = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert torch.equal(decode_e8m0(codes)[:255], oracle[:255])
    assert decode_e8m0(codes)[255].isnan()
    assert torch.equal(encode_e8m0(decode_e8m0(codes)), codes)
    assert encode_e8m0(torch.zeros(1)).tolist() == [0]


def test_stochastic_rounding_follows_its_dice_and_is_unbiased() -> None:
    x = torch.linspace(-6.0, 6.0, 4801)
    dice = torch.arange(256, dtype=torch.uint8)
    q = round_stochastic_e2m1(x[:, None].expand(-1, 256), dice.expand(len(x), -1))
    values = decode(torch.arange(16, dtype=torch.uint8), E2M1).unique()
    assert torch.isin(q, values).all()
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    # 256 dice are all there is: the mean is exact but for the last 1/256 of a step.
    assert ((q.mean(dim=1) - x).abs() <= step / 256).all()
    assert torch.equal(
        round_stochastic_e2m1(values, torch.zeros(len(values), dtype=torch.uint8)), values
    )


def test_unknown_scale_rounding_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="none of floor, rceil, ceil, even"):
        round_scale(torch.ones(1), E4M3, "up")


@pytest.mark.parametrize("fmt", [E2M1, E4M3, E5M2], ids=lambda f: f.name)
def test_only_floor_and_even_scales_can_saturate(fmt) -> None:  # type: ignore[no-untyped-def]
    amax = torch.rand(1000) * 2.0 ** torch.randint(-20, 20, (1000,))
    for mode in ("rceil", "ceil"):
        assert (amax / round_scale(amax, fmt, mode) <= fmt.max).all()
    assert (amax / round_scale(amax, fmt, "floor") > fmt.max).any()


def test_bytes_of_scales_are_the_codes_of_e4m3() -> None:
    codes = torch.arange(128, dtype=torch.uint8)  # of which the last is NaN
    assert torch.equal(encode_positive_e4m3(decode(codes, E4M3)), codes)
