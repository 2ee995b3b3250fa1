"""Integers of few bits: errors on normal weights, packing, and what GPTQ, AWQ and HQQ gain."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.awq import awq
from kernels.gptq import gptq
from kernels.hqq import hqq
from kernels.int8_mm import int8_dynamic_linear, int8_weight_linear
from kernels.integers import (
    integer_grid,
    pack_bits,
    span_codes,
    span_values,
    ternary_grid,
    unpack_bits,
)
from kernels.storage import Storage
from kernels.stored import restore, store


def _normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def _objective(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    error = (weight - rounded).double()
    return float((error @ hessian.double() * error).sum())


def _inputs(count: int, cols: int, seed: int) -> Tensor:
    """Return correlated inputs with a few channels of large values."""
    x = _normal(count, cols, seed) @ _normal(cols, cols, seed + 1) * cols**-0.5
    x[:, :: cols // 4] *= 8.0
    return x


@pytest.mark.parametrize(
    ("storage", "error"),
    [
        (Storage("int8", 8), 0.00785),
        (Storage("int", 4, 32), 0.0970),
        (Storage("int", 4, 128), 0.1174),
        (Storage("int", 4, 32, symmetric=False), 0.0782),
        (Storage("int", 3, 64, symmetric=False), 0.192),
        (Storage("int", 2, 32, symmetric=False), 0.393),
        (Storage("ternary", 2), 0.5134),
        (Storage("nf4_single", 4), 0.0920),
        (Storage("nf4", 4), 0.0920),
        (Storage("nvfp4", 4), 0.0952),
        (Storage("mxfp4", 4), 0.1148),
        (Storage("mxfp8", 8), 0.0266),
        (Storage("fp8", 8), 0.0265),
    ],
    ids=str,
)
def test_a_format_has_its_published_error_on_normal_weights(storage: Any, error: float) -> None:
    weight = _normal(256, 1024)
    packed = store(weight, storage)
    rounded = restore(packed, storage, 256, 1024)
    assert float((rounded - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.02)
    assert all(not part.is_floating_point() for part in packed.values())
    again = restore(store(rounded, storage), storage, 256, 1024)
    if storage.elements not in ("ternary", "nf4"):  # a mean of what is rounded is another one
        torch.testing.assert_close(again, rounded, rtol=0.01, atol=1e-3)
    odd = store(weight[:3, :50], storage)
    assert restore(odd, storage, 3, 50).shape == (3, 50)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packed_codes_come_back_and_take_their_bits(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 24), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (5, 24 * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, 24), codes)


def test_a_ternary_grid_makes_31_percent_of_normal_weights_0() -> None:
    grid = ternary_grid(_normal(256, 256))
    assert float((grid.codes(_normal(256, 256)) == 0).float().mean()) == pytest.approx(
        0.310, abs=0.005
    )


def test_gptq_leaves_less_than_rounding_to_nearest_on_at_least_95_percent_of_layers() -> None:
    better, ratios = 0, []
    for seed in range(40):
        weight, x = _normal(8, 48, seed), _inputs(128, 48, seed)
        hessian, plain = x.T @ x, integer_grid(weight, 4, 16)
        grid, codes = gptq(weight, hessian, 4, 16)
        left = _objective(weight, grid.values(codes), hessian)
        nearest = _objective(weight, plain.values(plain.codes(weight)), hessian)
        better += left <= nearest
        ratios.append(left / nearest)
    assert better >= 38
    assert sorted(ratios)[20] < 0.7


def test_gptq_is_rounding_to_nearest_where_channels_are_independent() -> None:
    weight = _normal(16, 160)
    plain = integer_grid(weight, 4, 32)
    grid, codes = gptq(weight, torch.diag(torch.rand(160) + 0.1), 4, 32)
    assert torch.equal(codes, plain.codes(weight))
    assert torch.equal(grid.scales, plain.scales)


def test_gptq_is_greedy_optimal_rounding_of_a_row_of_4() -> None:
    """Optimal brain quantisation in order of columns, by least squares for what is left."""
    weight, x = _normal(4, 4), _inputs(64, 4, 0)
    hessian = x.T @ x
    grid, codes = gptq(weight, hessian, 3)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(4).double()
    for row, own in zip(weight.double(), codes, strict=True):
        left, index = row.clone(), int((weight.double() == row).all(dim=1).nonzero()[0])
        scale = float(grid.scales[index, 0])
        for column in range(4):
            q = float((left[column] / scale).round().clamp(-3, 3))
            assert q == float(own[column])
            error, left[column] = left[column] - q * scale, q * scale
            behind = slice(column + 1, 4)
            # What later weights must add so that the sum over the inputs changes least.
            if column < 3:
                fitted = torch.linalg.solve(damped[behind, behind], damped[behind, column])
                left[behind] += fitted * error


def test_awq_changes_no_product_by_its_scales_and_finds_no_worse_a_than_0() -> None:
    weight, x = _normal(32, 64), _inputs(256, 64, 3)
    hessian, plain = x.T @ x, integer_grid(weight, 4, 32)
    grid, codes, inverse = awq(weight, hessian, x.abs().mean(dim=0), 4, 32)
    folded = (x * inverse) @ (weight / inverse).T
    torch.testing.assert_close(folded, x @ weight.T, rtol=1e-5, atol=1e-4)
    left = _objective(weight, grid.values(codes) * inverse, hessian)
    nearest = _objective(weight, plain.values(plain.codes(weight)), hessian)
    assert left < 0.8 * nearest


def test_hqq_leaves_a_smaller_norm_than_min_max_without_data() -> None:
    weight = _normal(32, 128)
    plain = integer_grid(weight, 4, 32, symmetric=False)
    grid, codes = hqq(weight, 4, 32)
    errors = [
        (weight - g.values(c)).abs().pow(0.7).sum()
        for g, c in ((grid, codes), (plain, plain.codes(weight)))
    ]
    assert errors[0] < 0.985 * errors[1]


def test_products_in_int8_are_those_of_the_rounded_operands() -> None:
    storage = Storage("int8", 8)
    for rows, bias in itertools.product((1, 5), (0.0, 100.0)):
        weight, x = _normal(40, 48), _normal(rows, 48, 7) + bias
        packed = store(weight, storage)
        scales = packed["scales"].view(torch.float32)[:, 0]
        full = restore(packed, storage, 40, 48)
        one = int8_weight_linear(x[None], packed["codes"], scales)[0]
        torch.testing.assert_close(one, x @ full.T, rtol=1e-5, atol=1e-3)
        step = x.abs().amax(dim=1, keepdim=True) / 127
        exact = (x / step).round() * step @ full.T
        both = int8_dynamic_linear(x[None], packed["codes"], scales)[0]
        torch.testing.assert_close(both, exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_spans_are_met_at_their_ends_wherever_they_lie(bits: int) -> None:
    """Rows as keys have them: far from 0, constant, zeros, beyond fp16."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[1] = x[1] * 0.01 + 12.0
    x[2], x[3], x[4] = 3.0, 0.0, torch.linspace(-1e9, 1e9, 32)
    codes, steps, least = span_codes(x, bits)
    values, top = span_values(codes, steps, least), 2**bits - 1
    assert codes[0].min() == 0
    assert codes[0].max() == top
    assert torch.equal(values[2], x[2])
    assert torch.equal(values[3], x[3])
    assert values.isfinite().all()
    assert values[4].min() == -65504.0
    assert values[4].max() > 6e4
    span = x.amax(dim=1) - x.amin(dim=1)
    bound = span / (2 * top) + x.abs().amax(dim=1) * 2.0**-10
    errors = (values - x).abs().amax(dim=1)
    assert bool((errors <= bound)[[0, 1, *range(5, 64)]].all())
    assert errors[1] < 0.01 * 5 / top  # of its own span, not of its distance from 0
