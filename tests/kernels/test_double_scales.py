"""Quantisers of groups of blocks, UFP4 and the recipes made of them, against their definitions."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.diagnostics import statistics
from kernels.double_scales import EDEN_TOP, quantise_double_block, quantise_ms_eden
from kernels.emulate import emulate
from kernels.formats import E1M2, E4M3, decode, encode, round_nearest, round_stochastic
from kernels.gemm_recipes import LinearRecipe
from kernels.hadamard import hadamard
from kernels.operands import Operands
from kernels.philox import Dice, NoiseKey
from kernels.quantise import Quantised, quantise_nvfp4
from kernels.quantised_linear import quantised_linear
from kernels.quantiser import Quantiser
from models.recipes import linear_recipe
from tests.kernels.oracles import KINDS, inputs
from tests.plain_nodes import shipped

E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).double()
E4M3_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Round to the nearest of `values`, ties to the even index; beyond them to the last."""
    magnitude = x.abs().clamp(max=float(values[-1]))[..., None]
    distance = (magnitude - values).abs()
    even = torch.arange(len(values)) % 2 * 1e-12
    return values[(distance + even * distance.clamp(min=1e-9)).argmin(-1)] * x.sign()


def _ms_eden(z: Tensor, d: int) -> Tensor:
    """The definition in fp64, row by row of [groups, blocks, 16]; scales to nearest."""
    m = 6 / ((17 / 16) * 0.93)
    blocks = z.double().view(-1, d // 16, 16)
    tensor = blocks.abs().max() / 255.99 / m
    scale = _nearest(blocks.abs().amax(-1) / (m * tensor), E4M3_VALUES)
    scale = torch.where(scale == 0, 1.0, scale)[..., None]
    u = blocks / (scale * tensor)
    q = _nearest(u, E2M1_VALUES)
    exact, rounded = blocks.square().sum((1, 2)), (blocks * q * scale * tensor).sum((1, 2))
    scale = _nearest(scale * (exact / rounded)[:, None, None], E4M3_VALUES)
    return (q * scale * tensor).view(z.shape)


def _double_block(x: Tensor) -> Tensor:
    wide = x.double().view(-1, 8, 16)
    outer = wide.abs().amax((1, 2), keepdim=True) / 2688
    scale = _nearest(wide.abs().amax(-1, keepdim=True) / outer / 6, E4M3_VALUES)
    scale = torch.where(scale == 0, 2.0**-9, scale)
    return (_nearest(wide / (scale * outer), E2M1_VALUES) * scale * outer).view(x.shape)


def _ufp4(x: Tensor) -> Tensor:
    blocks = x.double().view(-1, 16)
    tensor = blocks.abs().max() / (448 * 7)
    scale = _nearest(blocks.abs().amax(-1, keepdim=True) / 7 / tensor, E4M3_VALUES)
    return ((blocks / (scale * tensor)).round().clamp(-7, 7) * scale * tensor).view(x.shape)


DEFINED = {
    "ms_eden": (Quantiser(format="nvfp4", block=(1, 16), scale="ms_eden", group=128), _ms_eden),
    "double_block": (
        Quantiser(format="nvfp4", block=(1, 16), scale="double_block", group=128),
        _double_block,
    ),
    "ufp4": (Quantiser(format="ufp4", block=(1, 16)), _ufp4),
}


@pytest.mark.parametrize("name", DEFINED)
def test_a_quantiser_is_its_definition_in_fp64(name: str) -> None:
    """But where fp32 falls on the other side of a tie: one element in two thousand at most."""
    quantiser, definition = DEFINED[name]
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    found, wanted = (
        quantiser(x).dequantise().double(),
        (
            definition(x, 128) if name == "ms_eden" else definition(x)  # type: ignore[operator]
        ),
    )
    same = torch.isclose(found, wanted, rtol=1e-6, atol=0.0)
    assert float(same.double().mean()) > 0.9995
    down = quantiser.along(0)(x.T.contiguous())
    assert torch.equal(down.dequantise().T, quantiser(x).dequantise())


@pytest.mark.parametrize("name", DEFINED)
def test_operands_are_exact_in_bf16_for_inputs_of_every_kind(name: str) -> None:
    quantiser = DEFINED[name][0]
    for kind in KINDS:
        x = inputs(kind)
        quantised, operand = quantiser(x), emulate(x, quantiser, 1)
        assert quantised.dequantise().isfinite().all()
        assert torch.equal(quantised.scaled().bfloat16().float(), quantised.scaled())
        scales = round_nearest(quantised.scales, E4M3)
        assert torch.equal(scales, quantised.scales)
        wanted = quantised.dequantise()
        assert torch.allclose(operand.dequantised(), wanted, rtol=2.0**-22, atol=0.0)
        described = statistics(x, quantised)
        assert float(described["sqnr_db"]) > (8.0 if kind == "wide" else 15.0)
        assert float(described["saturation"]) < 0.001 or kind == "wide"  # scales of 0
        zeros = emulate(torch.zeros_like(x), quantiser, 1)
        assert not zeros.dequantised().any()


def _rotation(generator: torch.Generator) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < 128:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (128, 1), generator=generator) * 2.0 - 1.0
    return signs * matrix / 128**0.5


@pytest.mark.parametrize(("as_in_code", "slope"), [(False, 0.0), (True, -5.3e-4)])
def test_ms_eden_is_unbiased_over_signs_and_dice(as_in_code: bool, slope: float) -> None:
    """Within four standard errors; the authors' correction has the slope that was measured."""
    generator = torch.Generator().manual_seed(1)
    x, draws = torch.randn(64, 512, generator=generator), 100
    total, single = torch.zeros_like(x).double(), 0.0
    for _ in range(draws):
        turn = _rotation(generator)
        z = (x.view(-1, 128) @ turn).view(x.shape)
        bits = torch.randint(0, 256, z.shape, dtype=torch.uint8, generator=generator)
        q = quantise_ms_eden(z, block=(1, 16), group=128, bits=bits, as_in_code=as_in_code)
        back = (q.dequantise().view(-1, 128) @ turn.T).view(x.shape)
        total += back.double() / draws
        single += float((back - x).square().sum()) / draws
    size = float(x.square().sum())
    error = (single / draws / size / 1.0) ** 0.5 / size**0.5 * 2  # of the slope, doubled
    assert abs(float((total * x).sum()) / size - 1 - slope) < 4 * max(error, 2e-5)
    assert 0.0095 < single / size < 0.0101
    residual = float((total - x).square().sum())
    assert abs(residual * draws / single - 1) < (0.05 if not as_in_code else 0.1)


def test_ms_eden_scales_with_its_input_and_needs_whole_groups() -> None:
    x, bits = inputs("normal", 32, 256), torch.randint(0, 256, (32, 256), dtype=torch.uint8)

    def quantise(x: Tensor) -> Quantised:
        part = bits[:, : x.shape[1]].contiguous()
        return quantise_ms_eden(x, block=(1, 16), group=128, bits=part)

    assert torch.equal(quantise(x * 8).dequantise(), quantise(x).dequantise() * 8)
    assert quantise(x).denominator == EDEN_TOP
    with pytest.raises(ValueError, match="cols=192 is not a multiple of the block size 128"):
        quantise(x[:, :192].contiguous())


def test_scales_are_drawn_between_their_two_neighbours_as_often_as_they_are_near() -> None:
    scales = torch.tensor([1.0, 1.03, 17.0, 447.0, 2.0**-9 * 1.25, 0.9999])
    dice = (torch.arange(4096) + 0.5)[:, None] / 4096
    drawn = round_stochastic(scales.expand(4096, -1), dice.expand(-1, 6), E4M3)
    assert torch.equal(round_nearest(drawn, E4M3), drawn)
    assert all(len(column.unique()) <= 2 for column in drawn.T)
    torch.testing.assert_close(drawn.mean(0), scales, rtol=1e-4, atol=0.0)


def test_double_blocks_of_a_whole_row_are_row_scaled_nvfp4() -> None:
    """But for a block beside much larger ones, whose scale is E4M3's smallest and not 0."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    double = quantise_double_block(x, block=(1, 16), group=128)
    rows = quantise_nvfp4(x, row_scaled=True)
    assert torch.equal(double.scales, rows.scales)
    assert torch.equal(double.elements, rows.elements)
    x[:, :16] *= 2.0**-20
    double = quantise_double_block(x, block=(1, 16), group=128)
    assert torch.equal(double.scales[:, 0], torch.full((64,), 2.0**-9))
    assert not quantise_nvfp4(x, row_scaled=True).dequantise()[:, :16].any()


def test_ufp4_has_the_integers_to_seven_and_rounds_them_without_bias() -> None:
    """All 256 dice on a grid of 1/64; E2M1, whose steps grow, loses .4% of a Gaussian's slope."""
    values = torch.arange(-7 * 64, 7 * 64 + 1) / 64
    dice = torch.arange(256) / 256
    rounded = round_stochastic(values[:, None].expand(-1, 256), dice.expand(len(values), -1), E1M2)
    assert torch.equal(rounded.unique(), torch.arange(-7.0, 8.0))
    assert float((rounded.mean(1) - values).abs().max()) < 1 / 256
    integers = torch.arange(-7.0, 8.0)
    assert torch.equal(round_nearest(integers, E1M2), integers)
    assert torch.equal(decode(encode(integers, E1M2), E1M2), integers)
    products = integers[:, None] * E4M3_VALUES.float()
    assert torch.equal(products.bfloat16().float(), products)
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    uniform, e2m1 = (
        float((quantise_nvfp4(x, **options).dequantise() * x).sum() / x.square().sum()) - 1
        for options in ({"fmt": E1M2}, {})
    )
    assert abs(uniform) < 0.0015
    assert e2m1 < -0.0025


def _recipe(name: str) -> LinearRecipe:
    return linear_recipe(shipped("precision", name).default)


def _layer(name: str, x: Tensor, weight: Tensor, grad: Tensor, step: int = 0) -> list[Tensor]:
    """Return y, dx and dw of a linear layer under a shipped recipe."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = quantised_linear(x, weight, _recipe(name), layer=2, dice=_dice(step))
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def _dice(step: int = 0) -> Dice:
    return Dice.of(NoiseKey(seed=5, step=step, samples=torch.arange(2)))


def _tensors(tokens: int = 128, k: int = 128, n: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = inputs("normal", tokens, k).float(), inputs("normal", n, k, seed=1).float()
    return x, weight, inputs("normal", tokens, n, seed=2)


@pytest.mark.parametrize("name", ["quartet2", "tetrajet_v2"])
def test_the_backward_pass_quantises_what_the_forward_pass_has_quantised(name: str) -> None:
    """Each gradient is, to fp32's sums, the fp64 product of Q(H g) and Q(H Q(x)) or Q(H Q(w))."""
    x, weight, grad = _tensors()
    recipe, make = _recipe(name), Operands(layer=2, dice=_dice())
    y, dx, dw = _layer(name, x, weight, grad)
    forward = [
        o.quantiser(t.bfloat16() if t is x else t).dequantise().double()
        for o, t in ((recipe.fprop.left, x), (recipe.fprop.right, weight))
        if o is not None
    ]
    torch.testing.assert_close(y.double(), forward[0] @ forward[1].T, rtol=2.0**-7, atol=0.01)
    kept = [part.bfloat16() for part in forward]
    for gemm, pair, dim, number, found in (
        (recipe.dgrad, (grad, kept[1]), (1, 0), 2, dx),
        (recipe.wgrad, (grad, kept[0]), (0, 0), 4, dw),
    ):
        turned = [
            hadamard(t.contiguous(), make._matrix(gemm, number // 2, t.device), d)
            for t, d in zip(pair, dim, strict=True)
        ]
        assert gemm.left is not None
        left, right = (
            gemm.left.quantiser.along(d)(t, draw.bits(*t.shape)).dequantise().double()
            for i, (t, d) in enumerate(zip(turned, dim, strict=True))
            if (draw := make._draw(gemm.left, t, 128, number + i)) is not None
        )
        wanted = (left if dim[0] else left.T) @ right
        torch.testing.assert_close(found.double(), wanted, rtol=2.0**-7, atol=0.02)


@pytest.mark.slow
def test_gradients_of_quartet2_are_unbiased_about_the_quantised_forward_pass() -> None:
    """The error of a mean of n gradients is that of one, divided by n (see MXFP4's test)."""
    x, weight, grad = _tensors()
    recipe = _recipe("quartet2")
    assert recipe.fprop.left is not None
    made = [recipe.fprop.left.quantiser(t).dequantise().bfloat16().float() for t in (x, weight)]
    exact = [grad.float() @ made[1], grad.float().T @ made[0]]
    draws, single = 60, [0.0, 0.0]
    total = [torch.zeros_like(e) for e in exact]
    for step in range(draws):
        for i, found in enumerate(_layer("quartet2", x, weight, grad, step)[1:]):
            total[i] += found / draws
            single[i] += float((found - exact[i]).square().sum()) / draws
    for mean, wanted, one in zip(total, exact, single, strict=True):
        assert abs(float((mean * wanted).sum() / wanted.square().sum()) - 1) < 0.002
        assert float((mean - wanted).square().sum()) < 1.15 * one / draws


def test_averis_is_exact_where_all_tokens_are_equal_and_else_adds_the_mean_back() -> None:
    x, weight, grad = _tensors()
    same = x[:1].expand(128, -1).contiguous()
    y, _, dw = _layer("averis", same, weight, grad)
    assert torch.equal(y, (same @ weight.T).bfloat16())
    torch.testing.assert_close(dw, grad.float().T @ same, rtol=1e-4, atol=1e-3)
    shifted = x + 8.0
    recipe = _recipe("averis")
    mean = shifted.bfloat16().double().mean(0)
    rest = (shifted.bfloat16().double() - mean).bfloat16()
    assert recipe.fprop.left is not None
    assert recipe.fprop.right is not None
    left = recipe.fprop.left.quantiser(rest).dequantise().double()
    right = recipe.fprop.right.quantiser(weight).dequantise().double()
    wanted = left @ right.T + mean @ weight.double().T
    y, _, _ = _layer("averis", shifted, weight, grad)
    torch.testing.assert_close(y.double(), wanted, rtol=2.0**-7, atol=0.05)
    exact = shifted @ weight.T
    errors = [
        float((_layer(name, shifted, weight, grad)[0] - exact).norm() / exact.norm())
        for name in ("averis", "nvfp4_no_rht")
    ]
    assert errors[0] < 0.5 * errors[1]


def test_signs_of_the_backward_pass_are_shared_by_its_gemms_and_new_each_step() -> None:
    gemm = replace(_recipe("quartet2").dgrad, signs="backward")

    def matrix(number: int, step: int = 0, **options: Any) -> Tensor:
        make = Operands(layer=2, dice=_dice(step))
        return make._matrix(replace(gemm, **options), number, torch.device("cpu"))

    assert torch.equal(matrix(1), matrix(2))
    assert not torch.equal(matrix(1), matrix(1, step=1))
    assert not torch.equal(matrix(1, signs="step"), matrix(2, signs="step"))
