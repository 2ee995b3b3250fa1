"""A low-precision linear against fp64, against TransformerEngine, and GEMM by GEMM."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import emulate as emulation
from kernels import operand_pairs
from kernels.compilation import eager, use_compiler
from kernels.emulate import emulate
from kernels.gemm_recipes import GemmRecipe, LinearRecipe, OperandRecipe
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.operands import Operands, _quantile
from kernels.philox import Dice, Draw, NoiseKey, rounding_bits
from kernels.quantised_linear import quantised_linear
from kernels.quantiser import Quantiser
from kernels.scaled_mm import scaled_mm
from models.compiled_kernels import compile_for_cpu
from tests.kernels.oracles import inputs, te_reference

ONE = OperandRecipe(quantiser=Quantiser(format="nvfp4", block=(1, 16)))
SQUARE = OperandRecipe(quantiser=Quantiser(format="nvfp4", block=(16, 16)))
DICE = replace(ONE, stochastic=True)
NVFP4 = LinearRecipe(
    fprop=GemmRecipe(left=ONE, right=SQUARE),
    dgrad=GemmRecipe(left=DICE, right=SQUARE),
    wgrad=GemmRecipe(left=DICE, right=ONE, hadamard=16),
)
FORMATS = [
    Quantiser(format="nvfp4", block=(1, 16)),
    Quantiser(format="nvfp4", block=(16, 16)),
    Quantiser(format="nvfp4", block=(1, 16), row_scaled=True),
    Quantiser(format="nvfp4", block=(1, 16), four_over_six="mse", e4m3_max=256),
    Quantiser(format="mxfp4", block=(1, 32), scale="rceil"),
    Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
    Quantiser(format="mxfp8_e5m2", block=(1, 32), scale="floor"),
    Quantiser(format="fp8_e4m3", block=(0, 0)),
    Quantiser(format="fp8_e5m2", block=(0, 0)),
    Quantiser(format="fp8_e4m3", block=(1, 128), scale="power_of_two"),
    Quantiser(format="fp8_e4m3", block=(128, 128), scale="fp32"),
    Quantiser(format="fp8_e4m3", block=(1, 128), scale="fp32"),
]


def _name(quantiser: Quantiser) -> str:
    extra = "-rows" if quantiser.row_scaled else "-4over6" if quantiser.four_over_six else ""
    rows, cols = quantiser.block
    return f"{quantiser.format}-{rows}x{cols}-{quantiser.scale}{extra}"


_ALIKE = ("mxfp8_e4m3-1x32-rceil", "fp8_e5m2-0x0-te214", "fp8_e4m3-1x128-fp32")
# Each format's elements and each rule of scales once: a library takes ten seconds to compile.
COMPILED = [q for q in FORMATS if _name(q) not in _ALIKE]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """The eager references, whatever has run before and runs next."""
    use_compiler(eager)
    yield
    use_compiler(eager)


def _dice(samples: int = 4) -> Dice:
    return Dice.of(NoiseKey(seed=1, step=2, samples=torch.arange(samples) + 10))


@pytest.mark.slow
@pytest.mark.parametrize("quantiser", COMPILED, ids=_name)
def test_the_compiled_operand_is_the_reference_bit_for_bit(quantiser: Quantiser) -> None:
    use_compiler(compile_for_cpu)
    for kind in ("normal", "lognormal", "zeros", "ties"):
        x = inputs(kind, 128, 256)
        for dim in (1, 0) if quantiser == FORMATS[0] else (1,):
            operand, reference = emulate(x, quantiser, dim), quantiser.along(dim)(x)
            values = reference.elements if quantiser.stacked else reference.scaled()
            assert torch.equal(operand.values, values.bfloat16())
            if quantiser.folds:
                assert operand.folded is not None
                assert torch.equal(operand.folded, reference.packed()[1])
            assert operand.numerator is not None
            assert torch.equal(operand.numerator, reference.numerator)
            assert torch.equal(values.bfloat16().float(), values), "not exact in bf16"
            for _ in range(20):  # threads must not step on each other's scalars
                again = emulate(x, quantiser, dim)
                assert torch.equal(again.values, operand.values)
                assert torch.equal(again.numerator, operand.numerator)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantiser", FORMATS, ids=_name)
@pytest.mark.parametrize("fp32", [True, False])
def test_products_are_those_of_the_dequantised_operands(quantiser: Quantiser, fp32: bool) -> None:
    """Bound: fp32 sums lose at most k * 2**-24 of the magnitudes' sum, bf16 outputs 2**-8 more."""
    a, b = inputs("normal", 128, 512), inputs("lognormal", 256, 512, seed=1)
    got = scaled_mm(emulate(a, quantiser, 1), emulate(b, quantiser, 1), sums=(1, 1), fp32=fp32)
    left, right = quantiser(a).dequantise().double(), quantiser(b).dequantise().double()
    exact, size = left @ right.T, left.abs() @ right.abs().T
    bound = size * 512 * 2.0**-23 + (0 if fp32 else 2.0**-8) * exact.abs()
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("quantiser", FORMATS, ids=_name)
def test_a_sum_over_rows_is_the_product_of_the_transposed_operands(quantiser: Quantiser) -> None:
    both = inputs("normal", 128, 512), inputs("lognormal", 256, 512, seed=1)
    wanted = scaled_mm(*(emulate(x, quantiser, 1) for x in both), sums=(1, 1), fp32=True)
    turned = [emulate(x.T.contiguous(), quantiser, 0) for x in both]
    got = scaled_mm(*turned, sums=(0, 0), fp32=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_product_is_transformer_engines_qgemm() -> None:
    te = te_reference()
    a, b = inputs("normal", 256, 4096), inputs("normal", 256, 4096, seed=1)
    quantiser = te.NVFP4QuantizerRef(dtype=None, columnwise=False)
    (qa, sa, *_, row_a, _), (qb, sb, *_, row_b, _) = quantiser._quantize(a), quantiser._quantize(b)
    results = [
        type("Result", (), {"global_amax_row": r, "global_amax_col": r})() for r in (row_a, row_b)
    ]
    theirs = quantiser.qgemm(
        qa, qb, None, torch.bfloat16, sa, sb, qresult_x=results[0], qresult_w=results[1]
    )
    operands = (emulate(tensor, FORMATS[0], 1) for tensor in (a, b))
    ours = scaled_mm(*operands, sums=(1, 1), fp32=False)
    assert float((ours == theirs).float().mean()) > 0.999  # fp32 sums in another order


def test_each_gemm_of_the_published_recipe_is_what_its_operands_give() -> None:
    x = inputs("normal", 64, 64).float().requires_grad_()
    weight = torch.randn(96, 64, requires_grad=True)
    key = _dice()
    y = quantised_linear(x.view(4, 16, 64), weight, NVFP4, layer=3, dice=key)
    grad = torch.randn(4, 16, 96).bfloat16()
    y.backward(grad)
    rows = ONE.quantiser
    flat, g = x.detach().bfloat16(), grad.view(64, 96)
    w = emulate(weight.detach(), SQUARE.quantiser, 1)
    product = scaled_mm(emulate(flat, rows, 1), w, sums=(1, 1), fp32=False)
    assert torch.equal(y.view(64, 96), product)
    stream = (1 << 16) + 6 * 3
    dice = [Draw(key, stream + i, 64) for i in (2, 4)]
    wanted = scaled_mm(emulate(g, rows, 1, draw=dice[0]), w, sums=(1, 0), fp32=False)
    assert torch.equal(x.grad, wanted.float())
    turned = [hadamard(t, hadamard_matrix(16), 0) for t in (g, flat)]
    left, right = emulate(turned[0], rows, 0, draw=dice[1]), emulate(turned[1], rows, 0)
    assert torch.equal(weight.grad, scaled_mm(left, right, sums=(0, 0), fp32=True))


def test_bits_depend_on_the_sample_not_on_its_micro_batch() -> None:
    whole = rounding_bits(_dice(), 7, 64, 48)
    part = rounding_bits(
        Dice.of(NoiseKey(seed=1, step=2, samples=torch.tensor([12, 13]))), 7, 32, 48
    )
    assert torch.equal(part, whole[32:])
    assert abs(float(whole.float().mean()) - 127.5) < 5 * 74 / (64 * 48) ** 0.5
    assert not torch.equal(whole, rounding_bits(_dice(), 8, 64, 48))


def test_stochastic_gradients_are_unbiased_and_nearest_ones_are_not() -> None:
    """400 draws: the mean error of SR shrinks to its standard error, that of nearest stays.

    Dice are of samples, so that ten draws are the rows of one batch.
    """
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    grad = (torch.randn(64, 64) * 0.5).bfloat16()
    roomy = OperandRecipe(quantiser=replace(ONE.quantiser, sr_headroom=17 / 16), stochastic=True)
    gradients = []
    for step in range(40):
        leaf = x.repeat(10, 1).requires_grad_()
        recipe = LinearRecipe(dgrad=GemmRecipe(left=roomy))
        dice = Dice.of(NoiseKey(seed=0, step=step, samples=torch.arange(40)))
        out = quantised_linear(leaf, weight, recipe, layer=0, dice=dice)
        out.backward(grad.repeat(10, 1))
        assert leaf.grad is not None
        gradients.append(leaf.grad.view(10, 64, 64))
    exact = grad.float() @ weight.bfloat16().float()
    draws = torch.cat(gradients)
    error = (draws.mean(dim=0) - exact).abs().mean()
    spread = draws.std(dim=0).mean() / 400**0.5
    assert error < 1.5 * spread
    nearest = ONE.quantiser(grad).dequantise() @ weight.bfloat16().float()
    assert error < 0.2 * (nearest - exact).abs().mean()


def test_any_number_of_tokens_is_filled_up_and_ragged_widths_are_refused() -> None:
    x, weight = torch.randn(3, 7, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    y = quantised_linear(x, weight, NVFP4, layer=0, dice=_dice(3))
    assert y.shape == (3, 7, 48)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    with pytest.raises(ValueError, match="cols=20 is not a multiple of the block size 16"):
        quantised_linear(torch.randn(16, 20), torch.randn(16, 20), NVFP4, layer=0, dice=None)


def test_a_recipe_without_any_format_is_the_bf16_linear() -> None:
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    y = quantised_linear(x, weight, LinearRecipe(), layer=0, dice=None)
    assert torch.equal(y, x.bfloat16() @ weight.bfloat16().T)


def _run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return quantised_linear(x, weight, NVFP4, layer=0, dice=_dice(2)).float().square().sum()


def _gradients(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    x = inputs("normal", 32, 64).float().requires_grad_()
    weight = inputs("normal", 48, 64, seed=1).float().requires_grad_()
    loss = run(x, weight)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


@pytest.mark.slow
def test_a_compiled_linear_is_the_eager_one_bit_for_bit() -> None:
    """With the dice and the transform of its backward pass."""
    plain = _gradients(_run)
    use_compiler(compile_for_cpu)
    assert all(torch.equal(a, b) for a, b in zip(plain, _gradients(_run), strict=True))


def test_activation_checkpointing_and_no_grad_change_no_bit() -> None:
    plain = _gradients(_run)
    again = _gradients(lambda x, w: checkpoint(_run, x, w, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.no_grad():
        x, weight = inputs("normal", 32, 64).float(), inputs("normal", 48, 64, seed=1).float()
        assert torch.equal(_run(x, weight), plain[0])


def test_torch_compile_does_not_trace_the_test_of_the_triton_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU it launches kernels and catches what they raise: no graph would hold that."""

    def untraceable(device: torch.device, compare: object) -> bool:
        torch._dynamo.graph_break()
        return device.type == "cpu"

    for module in (emulation, operand_pairs):
        monkeypatch.setattr(module, "triton_agrees", untraceable)
    compiled = torch.compile(operand_pairs.fusible, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(16, 16), ONE.quantiser, 16) is True


@pytest.mark.slow
def test_torch_compile_changes_no_bit() -> None:
    """In a process of its own: Dynamo does not trace the type checks of these tests."""
    code = (
        "import torch; from tests.kernels.test_quantised_linear import _gradients, _run\n"
        "plain, compiled = _gradients(_run), _gradients(torch.compile(_run, fullgraph=True))\n"
        "assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.9999, 1.0])
def test_a_quantile_of_magnitudes_is_one_of_them(share: float) -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    ordered = x.float().abs().flatten().sort().values
    assert _quantile(x, share) == ordered[round(share * len(ordered)) - 1]


TSENG = OperandRecipe(
    quantiser=Quantiser(format="mxfp4", block=(1, 32), scale="floor", element_headroom=4 / 3),
    stochastic=True,
)
BACKWARD = GemmRecipe(left=TSENG, right=TSENG, hadamard=64, signs="step")


@pytest.mark.slow
def test_the_gradients_of_mxfp4_are_unbiased() -> None:
    """The error of a mean of n gradients is that of one, divided by n: none of it is the same in
    all. Signs that stay, or a weight rounded to nearest, leave a tenth of one (Tseng et al.)."""
    recipe = LinearRecipe(dgrad=BACKWARD, wgrad=BACKWARD)
    x = inputs("normal", 64, 64).float().requires_grad_()
    weight = inputs("normal", 64, 64, seed=1).float().requires_grad_()
    grad = inputs("normal", 64, 64, seed=2).bfloat16()
    exact = [grad.float() @ weight.detach().bfloat16().float(), grad.float().T @ x.detach()]
    draws, single = 60, [0.0, 0.0]
    total = [torch.zeros(64, 64), torch.zeros(64, 64)]
    for step in range(draws):
        dice = Dice.of(NoiseKey(seed=0, step=step, samples=torch.arange(2)))
        y = quantised_linear(x, weight, recipe, layer=0, dice=dice)
        for i, found in enumerate(torch.autograd.grad(y, (x, weight), grad)):
            total[i] += found / draws
            single[i] += float((found - exact[i]).square().sum()) / draws
    for mean, wanted, one in zip(total, exact, single, strict=True):
        assert abs(float((mean * wanted).sum() / wanted.square().sum()) - 1) < 0.004
        assert float((mean - wanted).square().sum()) < 1.15 * one / draws


def test_elements_at_three_quarters_never_saturate() -> None:
    """Exponents are those without headroom; the mean over all 256 dice is exact to 1/256 step."""
    x = torch.full((256, 32), 0.3)
    x[:, 7] = 7.9
    bits = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous()
    quantised = TSENG.quantiser(x, bits)
    plain = replace(TSENG.quantiser, element_headroom=1.0)(x, bits)
    assert torch.equal(quantised.scales, plain.scales)
    error = (quantised.dequantise().double().mean(dim=0) - x[0].double()).abs()
    assert float(error[7]) <= 2 * 4 / 3 / 256
    assert float(error.max()) <= 2 * 4 / 3 / 256
    assert float((plain.dequantise().double().mean(dim=0) - x[0].double()).abs()[7]) > 1.8


def test_signs_of_a_step_belong_to_step_layer_and_gemm_and_not_to_samples() -> None:
    def matrix(step: int, layer: int, number: int, samples: int = 2) -> torch.Tensor:
        dice = Dice.of(NoiseKey(seed=3, step=step, samples=torch.arange(samples)))
        return Operands(layer=layer, dice=dice)._matrix(BACKWARD, number, torch.device("cpu"))

    first = matrix(5, 1, 1)
    assert torch.equal(first, matrix(5, 1, 1, samples=4))
    assert torch.equal((first.float() @ first.float().T), torch.eye(64))
    for other in ((6, 1, 1), (5, 2, 1), (5, 1, 2)):
        assert not torch.equal(first, matrix(*other))
