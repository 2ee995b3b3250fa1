"""A model under TransformerEngine, whose API a fake keeps: no test machine has the hardware."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import native
from kernels.philox import NoiseKey
from kernels.quantiser import Quantiser
from models.decoder_config import DecoderConfig
from models.language_model import LanguageModel
from models.precision import Precision
from runner.learn.setup import recompute_blocks
from runner.records.config import validate
from tests.kernels.fake_engine import FakeEngine
from tests.kernels.oracles import te_recipes

Compose = Callable[..., dict[str, Any]]
MODEL = DecoderConfig(depth=2, width=64, num_heads=2, hidden=64)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake, recipes = FakeEngine(), te_recipes()

    def make(recipe: native.LinearRecipe, _: torch.device) -> Any:
        name, arguments = native.recipe_of(recipe)
        if "fp8_format" in arguments:
            arguments |= {"fp8_format": recipes.Format[arguments["fp8_format"]]}
        return getattr(recipes, name)(**arguments)

    monkeypatch.setenv("ESPALIER_EAGER_KERNELS", "1")
    torch.set_float32_matmul_precision("highest")  # other tests may have lowered it
    monkeypatch.setattr(native, "_transformer_engine", lambda: (fake, recipes))
    monkeypatch.setattr(native, "_make_recipe", make)
    return fake


def _prepared(compose: Compose, *overrides: str) -> tuple[Precision, LanguageModel]:
    model = MODEL.build(256, 0)
    precision = validate(compose(*overrides)).precision.build(torch.device("cpu"))
    precision.prepare(model)
    return precision, model


def _gradients(precision: Precision, model: LanguageModel) -> list[torch.Tensor]:
    tokens = torch.arange(2 * 16).view(2, 16) % 256
    for step in range(2):  # scales of the second step are made in the first
        model.zero_grad()
        precision.begin(step, 10)
        with precision.autocast(NoiseKey(seed=0, step=step, samples=torch.arange(2))):
            loss = model(tokens, tokens).total / tokens.numel()  # type: ignore[union-attr]
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8_delayed", "nvfp4"])
def test_recomputed_activations_are_those_of_the_engines_recipe(
    name: str, engine: FakeEngine, compose: Compose
) -> None:
    """Also with DelayedScaling, whose scales have changed by the time of the backward pass."""
    plain = _gradients(*_prepared(compose, f"precision={name}"))
    precision, model = _prepared(compose, f"precision={name}")
    recompute_blocks(model, precision)
    engine.calls.clear()
    again = _gradients(precision, model)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not [call for call in engine.calls if call[0] == "NoneType"]
    assert sum(again for _, again in engine.calls) == len(engine.calls) // 2


def test_a_backward_pass_of_kept_operands_is_that_of_the_dequantised_ones(
    engine: FakeEngine, compose: Compose
) -> None:
    """TransformerEngine's backward_override=dequantized; each GEMM against bf16 by hand."""
    kept = [f"precision.{gemm}.saved=quantised" for gemm in ("dgrad", "wgrad")]
    precision, model = _prepared(compose, "precision=nvfp4_forward", *kept)
    layer = next(m for m in model.modules() if getattr(m, "native", None))
    torch.manual_seed(37)  # 1 / (2688 / amax) and amax / 2688 differ for its amax, 3.828125
    x = torch.randn(32, 64).bfloat16().requires_grad_()
    precision.begin(0, 10)
    with precision.autocast(NoiseKey(seed=0, step=0, samples=torch.arange(2))):
        y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    made, weight = (
        (of.scaled() * (of.numerator / of.denominator)).bfloat16()
        for of in (
            Quantiser(format="nvfp4", block=block)(tensor.detach())
            for block, tensor in (((1, 16), x), ((16, 16), layer.weight))
        )
    )
    assert torch.equal(x.grad, grad @ weight)
    torch.testing.assert_close(layer.weight.grad, grad.float().T @ made.float())
    assert {row.format for row in precision.table if row.operand == "wgrad.x"} >= {
        "bf16 of quantised fprop.x"
    }


def test_activations_in_fp32_reach_the_engine_in_bf16(engine: FakeEngine, compose: Compose) -> None:
    """As the output of a norm does; TransformerEngine transforms nothing else."""
    precision, model = _prepared(compose, "precision=nvfp4")
    assert {row.backend for row in precision.table} >= {"TransformerEngine"}
    x = torch.randn(3, 64, requires_grad=True)
    with precision.autocast():
        y = next(m for m in model.modules() if getattr(m, "native", None))(x)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_an_engine_that_cannot_start_is_passed_over(engine: FakeEngine, compose: Compose) -> None:
    engine.broken = "CUDA driver is too old\n  at line 3"
    precision, _ = _prepared(compose, "precision=nvfp4")
    why = {row.backend for row in precision.table if row.backend != "torch"}
    assert why == {"emulated on cpu"}
    with pytest.raises(ValueError, match="RuntimeError: CUDA driver is too old; use precision"):
        _prepared(compose, "precision=nvfp4", "precision.backend=native")


def test_the_engines_dice_differ_by_seed_rank_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    for key in ((1, 0, 5), (2, 0, 5), (1, 1, 5), (1, 0, 6), (1, 0, 5), (11, 0, 5), (1, 10, 5)):
        native.seed_dice(*key)
    assert len(set(seeds)) == 6
    assert seeds[0] == seeds[4]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_step_sets_the_engines_dice_by_the_runs_seed(
    engine: FakeEngine, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[tuple[int, int, int]] = []
    monkeypatch.setattr(native, "seed_dice", lambda *key: keys.append(key))
    precision, _ = _prepared(compose, "precision=nvfp4")
    precision.begin(3, 10, seed=7)
    assert keys == [(7, 0, 3)]
