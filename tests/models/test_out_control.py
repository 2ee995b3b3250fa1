"""OutControl: which channels become outliers, and that a resume changes no bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.compilation import eager, use_compiler
from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from models.language_model import LanguageModel
from models.operand_config import OperandConfig
from models.out_control import OutControl
from models.out_control_config import OutControlConfig
from models.precision import Precision
from models.precision_config import FpropConfig, PrecisionConfig
from runner.learn.memory import predicted_bytes
from runner.records.config import validate
from tests.plain_nodes import shipped

MODEL = DecoderConfig(depth=1, width=64, num_heads=2, hidden=200)  # mlp.down is padded to 256
OUT_CONTROL = OutControlConfig(start_at=0.2, window=2, share=0.1)  # steps 1 and 2
STEPS, SAMPLES = 5, 4


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The eager references: compiling takes longer than these steps."""
    monkeypatch.setenv("ESPALIER_EAGER_KERNELS", "1")
    yield
    use_compiler(eager)


def _prepared(**options: Any) -> tuple[Precision, LanguageModel]:
    given = {"osci_reset": None, "out_control": OUT_CONTROL} | options
    model = MODEL.build(256, 0)
    precision = replace(shipped("precision", "tetrajet_v2"), **given).build(torch.device("cpu"))
    precision.prepare(model)
    return precision, model


def _step(
    precision: Precision, model: LanguageModel, step: int, micro: int = SAMPLES
) -> list[Tensor]:
    """Take a step of gradient descent on 32 tokens a sample; return its gradients."""
    tokens = (torch.arange(SAMPLES * 32) * (step + 3)).view(SAMPLES, 32) % 256
    precision.begin(step, STEPS)
    with precision.same_weights(micro < SAMPLES):
        for first in range(0, SAMPLES, micro):
            samples = torch.arange(first, first + micro)
            with precision.autocast(NoiseKey(seed=0, step=step, samples=samples)):
                loss = model(tokens[samples], tokens[samples]).total  # type: ignore[union-attr]
            (loss / tokens.numel()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.zero_grad()
    precision.after_update()
    return gradients


def test_outliers_are_the_channels_with_the_largest_norms_of_the_window() -> None:
    """Against the definition in fp64; 10% of 256 is rounded up to 128.

    The norms are those of a step, however many micro-batches it has.
    """
    for micro in (SAMPLES, 1):
        precision, model = _prepared()
        (down,) = (n for n in precision._linears if n.name == "layers.0.mlp.down")
        seen: list[Tensor] = []
        down.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].detach()))
        norms = torch.zeros(200, dtype=torch.float64)
        for step in (1, 2):
            seen.clear()
            _step(precision, model, step, micro)
            rows = torch.cat([x.bfloat16().double().flatten(0, -2) for x in seen])
            norms += torch.linalg.vector_norm(rows, dim=0)
            if step == 1:
                assert down.columns is None
                found = precision.state()["out_control.norms.layers.0.mlp.down"]
                torch.testing.assert_close(found[:200], norms, rtol=1e-12, atol=0.0)
        assert down.columns is not None
        assert set(down.columns.outliers.tolist()) == set(
            norms.argsort(descending=True)[:128].tolist()
        )
        assert len(down.columns.rest) == 128


def test_a_resume_before_in_and_after_the_window_has_the_same_bits() -> None:
    precision, model = _prepared()
    saved, gradients = [], []
    for step in range(STEPS):
        state = {name: tensor.clone() for name, tensor in precision.state().items()}
        saved.append((state, {k: v.clone() for k, v in model.state_dict().items()}))
        gradients.append(_step(precision, model, step))
    kinds = [{name.split(".")[1] for name in state} for state, _ in saved]
    assert kinds == [set(), set(), {"norms"}, {"outliers"}, {"outliers"}]
    for first in (2, 3, 4):
        again, twin = _prepared()
        twin.load_state_dict(saved[first][1])
        again.load(saved[first][0])
        for step in range(first, STEPS):
            found = _step(again, twin, step)
            assert all(torch.equal(a, b) for a, b in zip(found, gradients[step], strict=True))
    other, twin = _prepared(out_control=None)
    twin.load_state_dict(saved[3][1])
    assert not torch.equal(_step(other, twin, 3)[-1], gradients[3][-1])


def test_osci_reset_takes_the_quantised_values_of_outliers_from_fp8() -> None:
    precision, model = _prepared()
    for step in range(3):
        _step(precision, model, step)
    (down,) = (n for n in precision._linears if n.name == "layers.0.mlp.down")
    assert down.columns is not None
    weight = down.weight.detach()
    wrong = down.quantised_weight(weight) - weight
    errors = (wrong.square().sum(0) / weight.square().sum(0)).sqrt()
    outlier = torch.zeros(256, dtype=torch.bool)
    outlier[down.columns.outliers] = True
    assert float(errors[outlier[:200]].max()) < 0.04 < float(errors[~outlier[:200]].min())


def test_a_recipe_in_which_it_would_not_count_is_refused_and_native_by_name() -> None:
    four = OperandConfig(format="nvfp4")
    for fprop, message in (
        (FpropConfig(w=four), "out_control needs formats of four bits"),
        (FpropConfig(x=four, w=four, hadamard=16), "but fprop has hadamard=16, centred=False"),
    ):
        cfg = PrecisionConfig(compute="bf16", fprop=fprop, out_control=OUT_CONTROL)
        with pytest.raises(ValueError, match=message):
            cfg.check(STEPS)
    with pytest.raises(ValueError, match="backend=native: out_control has two formats in one"):
        _prepared(backend="native")


@pytest.mark.parametrize("samples", [4, 64])
def test_the_plan_counts_the_larger_of_a_step_in_the_window_and_one_after_it(
    compose: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """With few tokens the first, with many the second, whose activations are not kept as codes."""
    sizes = [f"train.{key}={samples}" for key in ("batch_size", "micro_batch")]
    run = validate(compose("model=gpt_pico", "precision=tetrajet_v2", "model.width=256", *sizes))
    monkeypatch.setattr("runner.learn.memory._TENSOR_BYTES", {})
    planned, both = predicted_bytes(run, 256, gpu=True), OutControl.reserve
    alone = []
    for chosen in (0, 1):

        def one(self: OutControl, chosen: int = chosen) -> Iterator[None]:
            yield from (None for number, _ in enumerate(both(self)) if number == chosen)

        monkeypatch.setattr(OutControl, "reserve", one)
        monkeypatch.setattr("runner.learn.memory._TENSOR_BYTES", {})
        alone.append(predicted_bytes(run, 256, gpu=True))
    assert planned == pytest.approx(max(alone), rel=1e-3)
    assert alone.index(max(alone)) == (samples == 64)


def test_a_layer_with_outliers_is_not_multiplied_by_tensor_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.quantised_layer.passed_over", lambda recipe, device: None)
    for out_control, multiplied in ((OUT_CONTROL, False), (None, True)):
        precision, _ = _prepared(out_control=out_control, backend="auto")
        assert multiplied in {linear.tensor_cores for linear in precision._linears}
        assert multiplied or not any(linear.tensor_cores for linear in precision._linears)
