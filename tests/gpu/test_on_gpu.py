"""What must hold on a GPU as on the CPU; needs torch, jaxtyping and pytest only: make test-gpu."""

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
from kernels.formats import E4M3, E5M2
from kernels.native import (
    Unsupported,
    apply,
    native_autocast,
    native_linear,
    native_recipe,
    published,
)
from kernels.philox import NoiseKey, keep_mask
from kernels.quantised_linear import Delayed, LinearRecipe, quantised_linear
from models.decoder_config import DecoderConfig
from models.language_model import TokenLoss
from models.precision_config import PrecisionConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_dropout_draws_the_same_bits() -> None:
    masks = []
    for device in ("cpu", "cuda"):
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
    for device in ("cpu", "cuda"):
        h, w = (t.to(device).requires_grad_() for t in (hidden, weight))
        loss, nll = linear_cross_entropy(h, w, targets.to(device), z_loss=1e-4)
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        results.append([t.detach().cpu() for t in (loss, nll, h.grad, w.grad)])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_agrees_with_the_cpu(precision: str, compiled: bool) -> None:
    """fp32 to 1e-3 relative, bf16 to the 2**-7 of one rounding."""
    losses = []
    for device in ("cpu", "cuda"):
        cfg = DecoderConfig(depth=2, width=64, num_heads=4, num_kv_heads=2, dropout=0.1)
        model = cfg.build(100, 0).to(device)
        recipe = PrecisionConfig(compute=precision).build(torch.device(device))  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        forward = torch.compile(model) if compiled and device == "cuda" else model
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 100, (4, 33), generator=generator).to(device)
        for step in range(5):
            noise = NoiseKey(seed=0, step=step, samples=torch.arange(4, device=device))
            with recipe.autocast():
                out = forward(tokens[:, :-1], tokens[:, 1:], noise=noise)
            assert isinstance(out, TokenLoss)
            (out.total / 128).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(out.total))
    tolerance = 1e-3 if precision == "fp32" else 2**-7
    assert losses[5:] == pytest.approx(losses[:5], rel=tolerance)


def test_triton_nvfp4_is_the_reference_bit_for_bit() -> None:
    from kernels.emulate import Quantiser
    from kernels.triton_nvfp4 import quantise

    x = torch.randn(4096, 1024, device="cuda").bfloat16()
    bits = torch.randint(0, 256, x.shape, dtype=torch.uint8, device="cuda")
    for block in ((1, 16), (16, 1), (16, 16)):
        for dice in (None, bits):
            values, numerator = quantise(x, block, dice)
            reference = Quantiser(format="nvfp4", block=block)(x, dice)
            assert torch.equal(values, reference.scaled().bfloat16())
            assert torch.equal(numerator, reference.numerator)


def _scales_of_one(recipe: LinearRecipe) -> Delayed:
    """The magnitudes by which delayed scales are 1, as TransformerEngine's first ones are."""
    gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
    operands = [operand for gemm in gemms for operand in (gemm.left, gemm.right)]
    wide = [o is not None and o.quantiser.format == "fp8_e5m2" for o in operands]
    amax = torch.tensor([E5M2.max if w else E4M3.max for w in wide], device="cuda")
    return Delayed(amax, amax.clone())


@pytest.mark.parametrize(
    ("name", "arguments", "recipe"), published(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_native_gemms_agree_with_emulated_ones(
    name: str, arguments: dict[str, object], recipe: LinearRecipe
) -> None:
    """On a chip with the units: only sums, bf16 gradients and stochastic rounding differ."""
    device = torch.device("cuda")
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
