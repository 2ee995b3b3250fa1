"""Kernels on a GPU against the CPU; native GEMMs against emulated ones."""

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
from kernels.formats import E4M3, E5M2
from kernels.gemm_recipes import LinearRecipe
from kernels.native import (
    Unsupported,
    apply,
    native_autocast,
    native_linear,
    native_recipe,
    published,
)
from kernels.operands import Delayed
from kernels.philox import NoiseKey, keep_mask
from kernels.quantised_linear import quantised_linear
from kernels.state_pass import has_state_pass
from tests.gpu.device import CPU, DEVICE, HAS_GPU, needs_gpu
from tests.kernels import recurrence_cases

pytestmark = needs_gpu


def test_dropout_draws_the_same_bits() -> None:
    masks = []
    for device in (CPU, DEVICE):
        key = NoiseKey(seed=3, step=5, samples=torch.tensor([0, 7], device=device))
        masks.append(keep_mask(key, 2, 1001, 0.3).cpu())
    assert torch.equal(*masks)


def test_cross_entropy_and_its_gradients_agree() -> None:
    """fp32 without TF32: sums in another order, 1e-4 relative."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(1000, 64)
    targets = torch.randint(0, 1000, (300,))
    results = []
    for device in (CPU, DEVICE):
        h, w = (t.clone().to(device).requires_grad_() for t in (hidden, weight))
        loss, nll = linear_cross_entropy(h, w, targets.to(device), z_loss=1e-4)
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        results.append([t.detach().cpu() for t in (loss, nll, h.grad, w.grad)])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", recurrence_cases.KINDS)
def test_a_recurrence_agrees_with_that_in_fp64(kind: str) -> None:
    """A head's width, and widths and chunks that fill no tile."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for shape, chunk in (((2, 3, 300, 64, 64), 64), ((2, 2, 70, 20, 36), 16)):
        recurrence_cases.check_recurrence(kind, shape, chunk, DEVICE)


@pytest.mark.skipif(not HAS_GPU, reason="a CPU passes states chunk after chunk")
def test_the_states_of_chunks_are_passed_by_a_kernel() -> None:
    assert has_state_pass(DEVICE)
    recurrence_cases.check_pass(DEVICE)


def _scales_of_one(recipe: LinearRecipe) -> Delayed:
    """The magnitudes by which delayed scales are 1, as TransformerEngine's first ones are."""
    gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
    operands = [operand for gemm in gemms for operand in (gemm.left, gemm.right)]
    wide = [o is not None and o.quantiser.format == "fp8_e5m2" for o in operands]
    amax = torch.tensor([E5M2.max if w else E4M3.max for w in wide], device=DEVICE)
    return Delayed(amax, amax.clone())


@pytest.mark.parametrize(
    ("name", "arguments", "recipe"), published(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_native_gemms_agree_with_emulated_ones(
    name: str, arguments: dict[str, object], recipe: LinearRecipe
) -> None:
    """On a chip with the units: only sums, bf16 gradients and stochastic rounding differ."""
    device = DEVICE
    try:
        engine = native_recipe(recipe, device)
    except Unsupported as reason:
        pytest.skip(str(reason))
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(256, 256, device=device).bfloat16() for _ in range(3))
    results = []
    for native in (True, False):
        a, w = x.clone().requires_grad_(), torch.nn.Parameter(weight.float())
        if native:
            linear = native_linear(256, 256)
            with torch.autocast("cuda", dtype=torch.bfloat16), native_autocast(engine):
                y = apply(linear, a, w)
        else:
            y = quantised_linear(a, w, recipe, layer=0, dice=None, delayed=_scales_of_one(recipe))
        y.backward(grad)
        assert a.grad is not None
        assert w.grad is not None
        results.append([t.detach().float() for t in (y, a.grad, w.grad)])
    bound = 0.3 if arguments.get("disable_stochastic_rounding") is False else 0.01
    for theirs, ours in zip(*results, strict=True):
        assert float((theirs - ours).norm() / ours.norm()) < bound
