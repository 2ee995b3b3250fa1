"""What must hold on a GPU as on the CPU; needs torch, jaxtyping and pytest only: make test-gpu."""

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
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
            amax = torch.stack([t.abs().max().float() for t in (x, weight, grad, weight, grad, x)])
            seen = Delayed(amax, amax.clone()) if name == "DelayedScaling" else None
            y = quantised_linear(a, w, recipe, layer=0, dice=None, delayed=seen)
        y.backward(grad)
        assert a.grad is not None
        assert w.grad is not None
        results.append([t.detach().float() for t in (y, a.grad, w.grad)])
    # TransformerEngine's first delayed scales are 1, ours those of this very tensor.
    dice = arguments.get("disable_stochastic_rounding") is False
    bound = 0.3 if dice else 0.05 if name == "DelayedScaling" else 0.01
    for theirs, ours in zip(*results, strict=True):
        assert float((theirs - ours).norm() / ours.norm()) < bound
