"""Precision recipes: the layers that they reach, what they refuse, how they change over a run."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.compilation import eager, use_compiler
from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from models.language_model import LanguageModel
from models.operand_config import OperandConfig
from models.precision import Precision, QuantisedLinear
from models.precision_config import (
    FpropConfig,
    LinearConfig,
    PrecisionConfig,
    RuleConfig,
)
from runner.records.config import validate

ROOT = Path(__file__).parent.parent.parent
NAMES = sorted(p.stem for p in (ROOT / "conf" / "precision").glob("*.yaml"))
LOW = [name for name in NAMES if name not in ("fp32", "bf16")]
MODEL = DecoderConfig(depth=4, width=128, num_heads=4, hidden=256)
FORWARD = FpropConfig(x=OperandConfig(format="nvfp4"), w=OperandConfig(format="nvfp4"))
Compose = Callable[..., dict[str, Any]]


def _prepared(
    cfg: PrecisionConfig, model: DecoderConfig = MODEL
) -> tuple[Precision, LanguageModel]:
    built = model.build(256, 0)
    precision = cfg.build(torch.device("cpu"))
    precision.prepare(built)
    return precision, built


def _config(compose: Compose, name: str) -> PrecisionConfig:
    cfg: PrecisionConfig = validate(compose(f"precision={name}")).precision
    return cfg


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The eager references: compiling every variant of every recipe takes minutes."""
    monkeypatch.setenv("ESPALIER_EAGER_KERNELS", "1")
    yield
    use_compiler(eager)


def _step(
    precision: Precision, model: LanguageModel, step: int = 0, steps: int = 10
) -> list[torch.Tensor]:
    tokens = torch.arange(2 * 24).view(2, 24) % 256
    precision.begin(step, steps)
    with precision.autocast(NoiseKey(seed=0, step=step, samples=torch.arange(2))):
        loss = model(tokens, tokens).total / tokens.numel()  # type: ignore[union-attr]
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW)
def test_every_recipe_of_conf_trains_close_to_bf16(name: str, compose: Compose) -> None:
    """No gradient is lost, and the loss differs by less than a tenth: the formats' own error."""
    cfg = _config(compose, name)
    low, high = (_step(*_prepared(c)) for c in (cfg, PrecisionConfig(compute="bf16")))
    assert abs(float(low[0] - high[0])) < 0.1
    for a, b in zip(low[1:], high[1:], strict=True):
        assert a.isfinite().all()
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert cosine > 0.8
    assert any(not torch.equal(a, b) for a, b in zip(low, high, strict=True))


def test_old_recipes_keep_their_fingerprints(compose: Compose) -> None:
    from runner.records.fingerprint import contents_of, science

    run = validate(compose("precision=bf16"))
    keys = {k: v for k, v in science(run, contents_of(run)).items() if k.startswith("precision")}
    target = "models.precision.PrecisionConfig"  # where it lay first
    assert keys == {
        "precision._target_": target,
        "precision.compute": "bf16",
        "precision.numerics": 2,
    }


def test_the_published_recipe_keeps_the_last_share_of_blocks(compose: Compose) -> None:
    precision, model = _prepared(_config(compose, "nvfp4"), replace(MODEL, depth=20))
    chosen = {c.layer: c.why for c in precision.table}
    last = {n.split(".")[1] for n, why in chosen.items() if why == "keep_last"}
    assert last == {"17", "18", "19"}  # 15% of 20
    assert not isinstance(model.blocks()[19].attn.qkv, QuantisedLinear)  # type: ignore[union-attr]
    formats = {c.operand: c.format for c in precision.table if c.layer == "layers.0.mlp.up"}
    assert formats == {
        "fprop.x": "nvfp4 1x16 te214 RNE",
        "fprop.w": "nvfp4 16x16 te214 RNE",
        "dgrad.g": "nvfp4 1x16 te214 SR",
        "dgrad.w": "nvfp4 16x16 te214 RNE",
        "wgrad.g": "nvfp4 1x16 te214 SR",
        "wgrad.x": "nvfp4 1x16 te214 RNE",
    }


def test_first_matching_rule_wins_and_says_so() -> None:
    rules = (
        RuleConfig(match="layers.0.*"),
        RuleConfig(match="*.mlp.*", fprop=FpropConfig(x=OperandConfig(format="mxfp8_e4m3"))),
    )
    cfg = PrecisionConfig(compute="bf16", fprop=FORWARD, rules=rules, keep=("*.qkv",))
    rows = {c.layer: (c.format, c.why) for c in _prepared(cfg)[0].table if c.operand == "fprop.x"}
    assert rows["layers.0.mlp.up"] == ("bf16", "rule layers.0.*")
    assert rows["layers.1.mlp.up"] == ("mxfp8_e4m3 1x32 rceil RNE", "rule *.mlp.*")
    assert rows["layers.1.attn.qkv"] == ("bf16", "keep *.qkv")
    assert rows["layers.1.attn.out"] == ("nvfp4 1x16 te214 RNE", "default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keep": ("*.atn.*",)},
            "precision.keep: '\\*.atn.\\*' matches no layer; there are: layers.0",
        ),
        ({"layers": ("nothing",)}, "matches no layer"),
        ({"keep_first": 2.0, "keep_last": 0.5}, "quantises no layer"),
        ({"keep": ("*",)}, "quantises no layer"),
    ],
)
def test_a_recipe_that_reaches_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _prepared(PrecisionConfig(compute="bf16", fprop=FORWARD, **change))


def test_a_width_that_fits_no_block_is_padded_at_a_stated_cost_or_refused() -> None:
    model = replace(MODEL, hidden=200)
    cfg = PrecisionConfig(compute="bf16", fprop=FORWARD)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down: k=200 is not a multiple of 16 .*pad"):
        _prepared(replace(cfg, pad=False), model)
    precision, built = _prepared(cfg, model)
    assert {c.why for c in precision.table if c.layer == "layers.0.mlp.down"} == {
        "default; 128x200 padded to 128x208, +4.0% FLOPs"
    }
    padded = _step(precision, built)
    assert all(g.isfinite().all() for g in padded)
    named = _step(*_prepared(replace(cfg, pad=True), model))
    assert all(torch.equal(a, b) for a, b in zip(padded, named, strict=True))


def test_every_model_takes_every_recipe_by_its_one_word(compose: Compose) -> None:
    recipes = {recipe: compose(f"precision={recipe}")["precision"] for recipe in LOW}
    for model in sorted(p.stem for p in (ROOT / "conf" / "model").glob("*.yaml")):
        node = compose(f"model={model}")
        for recipe, chosen in recipes.items():
            run = validate({**node, "precision": chosen})
            with torch.device("meta"):
                precision = run.precision.build(torch.device("cpu"), planning=True)
                precision.prepare(run.model.build(256, 0))
            assert any(row.backend != "torch" for row in precision.table), (model, recipe)


def test_nemotron3_super_is_the_published_table_on_a_hybrid_model(compose: Compose) -> None:
    """Attention in bf16, Mamba's output projection in MXFP8, the last 15% of blocks in bf16; a
    model without Mamba takes the recipe too."""
    run = validate(
        compose(
            "model=gpt_pico",
            "+model/part@model.parts.m=mamba2",
            "+model/part@model.parts.e=experts",
            "model.depth=20",
            "model.pattern='m e a e m'",
            "precision=nemotron3_super",
        )
    )
    with torch.device("meta"):
        precision = run.precision.build(torch.device("cpu"), planning=True)
        precision.prepare(run.model.build(256, 0))
    formats = {}
    for row in precision.table:
        _, number, *rest = row.layer.split(".")
        kind = "last" if int(number) >= 17 else f"{rest[0]}.{rest[-1]}"
        formats.setdefault(kind, set()).add(row.format.split()[0])
    assert formats == {
        "last": {"bf16"},
        "attn.qkv": {"bf16"},
        "attn.out": {"bf16"},
        "mamba.proj": {"nvfp4"},
        "mamba.out": {"mxfp8_e4m3"},
        "moe.up": {"nvfp4"},
        "moe.down": {"nvfp4"},
    }


@pytest.mark.parametrize(
    ("recipe", "length", "couples"),
    [
        ("tetrajet_v2", 128, False),
        ("tetrajet_v2", 64, True),
        *((name, 128, True) for name in ("quartet2", "ufp4", "averis", "nemotron3_super")),
    ],
)
def test_recipes_say_whether_samples_of_a_forward_pass_share_scales(
    recipe: str, length: int, couples: bool, compose: Compose
) -> None:
    assert _config(compose, recipe).couples_samples(length) is couples


@pytest.mark.parametrize("part", ["both", "forward", "backward"])
def test_the_late_switch_goes_on_in_bf16(part: str, compose: Compose) -> None:
    cfg = replace(_config(compose, "nvfp4_all_layers"), switch_at=0.82, switch=part)  # type: ignore[arg-type]
    high = _step(*_prepared(PrecisionConfig(compute="bf16")))
    precision, model = _prepared(cfg)
    early, late = (_step(precision, model, step, 100) for step in (81, 82))
    assert not torch.equal(early[0], high[0])
    assert torch.equal(late[0], high[0]) == (part != "backward")
    if part == "both":  # wgrad leaves its GEMM in fp32 here, under autocast in bf16
        for a, b in zip(late[1:], high[1:], strict=True):
            assert torch.allclose(a, b, rtol=2.0**-6, atol=float(b.abs().max()) * 2.0**-7)


def test_delayed_scaling_uses_earlier_steps_and_resumes(compose: Compose) -> None:
    cfg = _config(compose, "fp8_delayed")
    precision, model = _prepared(cfg)
    first, second = (_step(precision, model, step) for step in (0, 1))
    assert not torch.equal(first[0], second[0])  # scales of 1 before anything was seen
    saved = {k: v.clone() for k, v in precision.state().items()}
    third = _step(precision, model, 2)
    other, twin = _prepared(cfg)
    other.load(saved)
    assert all(torch.equal(a, b) for a, b in zip(third, _step(other, twin, 2), strict=True))


def test_delayed_scales_are_those_of_transformer_engine_step_by_step(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a transcript of its buffer: the largest first, then the roll and the cleared slot."""
    monkeypatch.setattr("models.delayed_scaling._HISTORY", 4)
    precision, model = _prepared(_config(compose, "fp8_delayed"))
    layer = model.blocks()[0].attn.qkv
    assert isinstance(layer, QuantisedLinear)
    assert layer.delayed is not None
    buffer, kept = torch.zeros(4), torch.zeros(())
    seen = [0.0, 5.0, 1.0, 9.0, 2.0, 3.0, 1.0, 1.0, float("inf"), *[1.0] * 6]
    for step, amax in enumerate(seen):
        precision.begin(step, len(seen))
        largest = buffer.max()
        kept = torch.where((largest > 0) & largest.isfinite(), largest, kept)
        buffer = torch.roll(buffer, -1)
        assert layer.delayed.amax[0] == kept, step
        layer.delayed.seen[0] = buffer[0] = amax


@pytest.mark.parametrize("name", ["quartet2", "tetrajet_v2", "ufp4", "averis"])
def test_a_recipe_keeps_no_state_so_that_a_resumed_step_has_the_same_bits(
    name: str, compose: Compose
) -> None:
    """Dice and signs are of (seed, step, layer, sample): no step depends on those before it.

    The windows of tetrajet_v2 begin at step 7.
    """
    cfg, small = _config(compose, name), replace(MODEL, depth=1)
    precision, model = _prepared(cfg, small)
    first, later = (_step(precision, model, step) for step in (0, 6))
    resumed = _step(*_prepared(cfg, small), 6)
    assert precision.state() == {}
    assert all(torch.equal(a, b) for a, b in zip(later, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_keeps_the_scales_of_delayed_scaling(
    value: float, compose: Compose
) -> None:
    """As in TransformerEngine; else a layer's gradients would be zeros for all of the history."""
    cfg = _config(compose, "fp8_delayed")
    (precision, model), (twin, other) = _prepared(cfg), _prepared(cfg)
    for step in (0, 1):
        _step(precision, model, step)
        _step(twin, other, step)
    (layer,) = (m for m in model.modules() if getattr(m, "name", "") == "layers.0.attn.qkv")
    layer.delayed.seen[2] = value  # as a gradient in bf16 that overflowed
    saved = {name: tensor.clone() for name, tensor in precision.state().items()}
    kept = layer.delayed.amax.clone()
    found, wanted = _step(precision, model, 2), _step(twin, other, 2)
    assert torch.equal(layer.delayed.amax[2], kept[2])
    assert float(kept[2]) > 0
    assert all(float(gradient.abs().max()) > 0 for gradient in found[1:])
    assert torch.equal(found[0], wanted[0])
    resumed, again = _prepared(cfg)
    resumed.load(saved)
    assert all(torch.equal(a, b) for a, b in zip(found, _step(resumed, again, 2), strict=True))


@pytest.mark.parametrize("what", ["input", "weight", "gradient"])
def test_checked_mode_stops_at_what_is_not_finite(what: str) -> None:
    precision, model = _prepared(PrecisionConfig(compute="bf16", fprop=FORWARD, check_finite=True))
    layer = model.blocks()[0].attn.qkv
    assert isinstance(layer, QuantisedLinear)
    nan = float("nan")
    if what == "input":
        layer.register_forward_pre_hook(lambda _, given: (given[0] * nan,))
    elif what == "weight":
        torch.nn.init.constant_(layer.weight, nan)
    else:
        layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * nan,))
    with pytest.raises(
        ValueError, match=rf"precision.check_finite: the {what} of layers.0.attn.qkv has NaN"
    ):
        _step(precision, model)


def test_native_is_refused_where_there_is_no_unit_and_auto_says_why(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _config(compose, "nvfp4")
    with pytest.raises(ValueError, match=r"backend=native: only a GPU has .*; use .*backend=auto"):
        _prepared(replace(cfg, backend="native"))
    backends = {c.backend for c in _prepared(cfg)[0].table}
    assert backends == {"torch", "emulated on cpu"}
    emulated = _prepared(replace(cfg, backend="emulated"))[0]
    assert {c.backend for c in emulated.table} == {"torch", "emulated: as asked for"}
    monkeypatch.setattr("models.quantised_layer.passed_over", lambda recipe, device: None)
    multiplied = _prepared(cfg)[0]
    why = "only a GPU has low-precision tensor cores"
    assert {c.backend for c in multiplied.table} == {"torch", f"torch._scaled_mm: {why}"}
    assert multiplied.backends == ["torch", "torch._scaled_mm"]


def test_evaluation_rounds_as_training_does_and_draws_nothing(compose: Compose) -> None:
    precision, model = _prepared(_config(compose, "nvfp4"))
    tokens = torch.arange(24)[None] % 256
    with torch.no_grad(), precision.autocast():
        one, two = (model(tokens) for _ in range(2))
    assert torch.equal(one, two)
    assert LinearConfig().plain


def test_diagnostics_name_layer_operand_and_statistic_and_change_no_bit(compose: Compose) -> None:
    cfg = _config(compose, "nvfp4")
    plain = _step(*_prepared(cfg))
    precision, model = _prepared(replace(cfg, diagnostics_every=5))
    probed = _step(precision, model)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    readings = precision.readings()
    assert readings["precision/layers.0.mlp.up/fprop.x/sqnr_db"] > 15
    assert readings["precision/layers.0.mlp.up/wgrad.x/kurtosis_gain"] > 0
    assert abs(readings["precision/layers.0.mlp.up/dgrad.g/bias"]) < 0.05
    assert len({name.split("/")[2] for name in readings}) == 5  # dgrad.w has the codes of fprop.w
    _step(precision, model, step=1)
    assert precision.readings() == {}


def test_predicting_memory_leaves_nothing_fake_behind(compose: Compose) -> None:
    from kernels.hadamard import _cached_matrix
    from runner.learn.memory import predicted_bytes

    _cached_matrix.cache_clear()
    run = validate(compose("precision=nvfp4_all_layers"))
    assert predicted_bytes(run, 256) > 0
    assert all(g.isfinite().all() for g in _step(*_prepared(run.precision)))
