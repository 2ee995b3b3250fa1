"""Every shipped recipe on a GPU against its emulation on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.operands import Delayed
from kernels.philox import Dice, NoiseKey
from kernels.quantised_linear import quantised_linear
from models.decoder_config import DecoderConfig
from models.language_model import TokenLoss
from models.recipes import linear_recipe
from tests.gpu.device import COMPILER, CPU, DEVICE, HAS_GPU, needs_gpu
from tests.plain_nodes import PRECISIONS, shipped

pytestmark = needs_gpu
NAMES = PRECISIONS if HAS_GPU else ["bf16", "fp8_delayed", "nvfp4"]
QUANTISED = [name for name in NAMES if name not in ("fp32", "bf16")]
COMPILED = ["fp32", "bf16", "fp8_delayed", "nvfp4"] if HAS_GPU else ["fp32"]
TOKENS = 4 * 40  # no multiple of the blocks of 128: tokens are padded


@pytest.fixture(autouse=True)
def eager_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's references uncompiled: all of them would take minutes to compile."""
    monkeypatch.setattr("models.precision.compile_kernels", lambda: None)


def _linear(name: str, device: torch.device) -> list[Tensor]:
    """Return output and gradients of one linear layer, in training."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, 256, generator=generator) for size in (TOKENS, 128, TOKENS)
    )
    x = x.bfloat16().to(device).requires_grad_()
    weight = (weight / 16).to(device).requires_grad_()
    noise = NoiseKey(seed=1, step=2, samples=torch.tensor([0, 5, 9, 4], device=device))
    amax = torch.full((6,), 4.0, device=device)
    y = quantised_linear(
        x,
        weight,
        linear_recipe(shipped("precision", name).default),
        layer=3,
        dice=Dice.of(noise),
        delayed=Delayed(amax, torch.zeros_like(amax)),
    )
    y.backward(grad[:, :128].bfloat16().to(device))
    assert x.grad is not None
    assert weight.grad is not None
    return [t.detach().float().cpu() for t in (y, x.grad, weight.grad)]


@pytest.mark.parametrize("name", QUANTISED)
def test_the_gemms_of_a_recipe_are_those_of_the_cpu(name: str) -> None:
    """2**-8: one rounding to bf16; dice are the same bits, stochastic roundings too."""
    for cpu, gpu in zip(_linear(name, CPU), _linear(name, DEVICE), strict=True):
        assert float((cpu - gpu).norm() / cpu.norm()) < 2**-8


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt_pico", "bdh"])  # LayerNorm, RMSNorm, BDH's
def test_the_head_multiplies_in_the_dtype_of_autocast(name: str) -> None:
    """A GPU's autocast norms in fp32; GEMMs of the head in fp32 took three quarters of a step."""
    cfg = replace(shipped("model", name), depth=1)
    model = cfg.build(100, 0).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        hidden = model(torch.arange(8, device=DEVICE)[None], give="hidden")
    assert hidden.dtype == torch.bfloat16


def _losses(name: str, device: torch.device, *, compiled: bool = False) -> list[float]:
    """Return the mean loss before each of three steps."""
    torch.compiler.reset()
    cfg = DecoderConfig(depth=2, width=128, num_heads=4, num_kv_heads=2, dropout=0.1)
    model = cfg.build(100, 0).to(device)
    precision = shipped("precision", name).build(device)
    precision.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model, backend=COMPILER) if compiled else model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 100, (4, 33), generator=generator).to(device)
    losses = []
    for step in range(3):
        precision.begin(step, 3)
        noise = NoiseKey(seed=0, step=step, samples=torch.arange(4, device=device))
        with precision.autocast(noise):
            out = forward(tokens[:, :-1], tokens[:, 1:], noise=noise)
        assert isinstance(out, TokenLoss)
        (out.total / 128).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.total.detach()) / 128)
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_a_model_agree_with_the_cpu(name: str) -> None:
    """Relative: fp32 1e-3, bf16 the 2**-7 of one rounding.

    2% where a sum in another order moves elements across the boundaries of a quantiser.
    """
    bound = {"fp32": 1e-3, "bf16": 2**-7}.get(name, 0.02)
    assert _losses(name, DEVICE) == pytest.approx(_losses(name, CPU), rel=bound)


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_is_the_eager_one(name: str) -> None:
    eager, compiled = _losses(name, DEVICE), _losses(name, DEVICE, compiled=True)
    assert compiled == pytest.approx(eager, rel=1e-4 if name == "fp32" else 0.02)
