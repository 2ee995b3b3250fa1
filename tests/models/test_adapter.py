"""Adapters: the base's bits at step 0, only adapters are trained, merging changes no logit."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from models.adapter import (
    AdaptedLinear,
    FrozenLinear,
    adapted_layers,
    adapter_names,
    base_loaded,
    base_state,
    merge,
    trained_state,
)
from models.adapter_config import AdapterConfig
from models.decoder_config import DecoderConfig
from models.experts_config import ExpertsConfig
from models.precision_config import FpropConfig, OperandConfig, PrecisionConfig
from models.quantised_layer import QuantisedLinear
from models.sizes import check_formulas, check_parameters, num_trained_parameters
from runner.learn.memory import _Storages
from runner.learn.optim.groups_config import AdamWConfig, MuonConfig
from runner.machine.ranks import Ranks
from runner.records.checkpoint import like

BASE = DecoderConfig(depth=2, width=64, num_heads=4, num_kv_heads=2, context_length=32)
TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 97
KINDS = ["lora", "rslora", "dora"]


def _adapted(cfg: DecoderConfig = BASE, **adapter: Any) -> Any:
    return replace(cfg, adapter=AdapterConfig(**adapter)).build(97, 0)


def _learn(model: Any, steps: int = 3, lr: float = 1e-2) -> list[float]:
    (optimizer,) = AdamWConfig(lr=lr).build(model)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS[:, :-1], TOKENS[:, 1:]).total / 46
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [{}, {"bias": True, "norm": "layernorm", "activation": "gelu"}])
def test_step_0_has_the_bits_of_the_base_and_then_it_learns(kind: Any, shape: Any) -> None:
    cfg = replace(BASE, **shape)
    plain, model = cfg.build(97, 0), _adapted(cfg, kind=kind, rank=4)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain(TOKENS))
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses = _learn(model)
    assert losses[-1] < losses[0] - 0.05
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == adapter_names(model) == set(trained_state(model))
    assert base_state(model).keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(base_state(model)[name], tensor)


@pytest.mark.parametrize("base", ["nf4", "nvfp4", "int8"])
def test_a_packed_base_computes_with_what_it_stands_for(base: Any) -> None:
    model = _adapted(base=base, rank=4, kind="dora")
    frozen = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    assert len(frozen) == 8
    names = {f"{name.removesuffix('.base')}.weight": m for name, m in frozen.items()}
    plain = BASE.build(97, 0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in names:
                close = (names[name].full_weight() - parameter).abs().mean()
                assert close < 0.15 * parameter.abs().mean()  # packed from the seed's own weights
                parameter.copy_(names[name].full_weight())
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-6)
    losses = _learn(model)
    assert losses[-1] < losses[0] - 0.05
    other = BASE.build(97, 1).state_dict()
    for name, target in base_state(model).items():
        if isinstance(target, FrozenLinear):
            target.take(other[name])
    base_loaded(model)
    layer = model.layers[0].attn.out
    torch.testing.assert_close(
        layer.magnitude["whole"].detach(),
        torch.linalg.vector_norm(layer.base.full_weight(), dim=1),
    )
    half = model.to(torch.bfloat16)
    assert all(not part.is_floating_point() for m in frozen.values() for part in m.packed.values())
    assert half(TOKENS).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_merged_logits_are_those_of_the_adapter(kind: Any, base: Any) -> None:
    model = _adapted(kind=kind, base=base, rank=4, targets=("*.q", "*.v", "*.down"))
    _learn(model)
    with torch.no_grad():
        expected = model(TOKENS)
        decoding = copy.deepcopy(model).for_inference()
        torch.testing.assert_close(decoding(TOKENS), expected, rtol=1e-5, atol=1e-5)
        half = copy.deepcopy(model).to(torch.bfloat16).for_inference()
        assert (half(TOKENS) - expected).abs().max() < 0.1
        merged = merge(model)
        assert (expected - BASE.build(97, 0)(TOKENS)).abs().max() > 0.01
        torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert merged.cfg.adapter is None
    assert merged.state_dict().keys() == BASE.build(97, 0).state_dict().keys()
    assert not adapted_layers(merged)


def test_targets_choose_layers_and_parts_of_them() -> None:
    model = _adapted(targets=("*.attn.qkv.q", "layers.1.mlp.down"), rank=2)
    assert {n: sorted(m.a) for n, m in adapted_layers(model).items()} == {
        "layers.0.attn.qkv": ["q"],
        "layers.1.attn.qkv": ["q"],
        "layers.1.mlp.down": ["whole"],
    }
    with pytest.raises(
        ValueError, match=r"'\*.nothing' matches no layer; there are: layers.0.attn.qk"
    ):
        _adapted(targets=("*.nothing",))
    with pytest.raises(ValueError, match="head' matches no layer"):
        _adapted(replace(BASE, tied=False), targets=("head",))
    with pytest.raises(ValueError, match="adapters on experts are not supported"):
        replace(
            BASE, pattern="ae", parts={"e": ExpertsConfig(num_experts=2)}, adapter=AdapterConfig()
        )


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_sizes_count_base_and_adapters(base: Any) -> None:
    cfg = replace(BASE, adapter=AdapterConfig(rank=4, base=base, kind="dora"))
    model = cfg.build(97, 0)
    check_parameters(cfg, 97, model)
    assert check_formulas(cfg, 97, 32) is None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_trained_parameters(cfg, 97) == trained
    # rank x (rows + cols) of q, k, v, out, gate, up, down, and a length for each row
    sizes = [(64, 64), (32, 64), (32, 64), (64, 64), (176, 64), (176, 64), (64, 176)]
    assert trained == 2 * sum(4 * (rows + cols) + rows for rows, cols in sizes)
    assert num_trained_parameters(BASE, 97) == BASE.num_parameters(97)
    for optim in (AdamWConfig(), MuonConfig()):
        held = [p for o in optim.build(model) for g in o.param_groups for p in g["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_rslora_keeps_the_update_of_high_ranks() -> None:
    """At a fixed alpha LoRA's first update shrinks with the rank, rsLoRA's does not."""
    moved = {}
    for kind in ("lora", "rslora"):
        for rank in (1, 64):
            model = _adapted(kind=kind, rank=rank, alpha=8.0)
            _learn(model, steps=1, lr=1e-3)
            layer = model.layers[0].attn.out
            assert isinstance(layer, AdaptedLinear)
            moved[kind, rank] = float((layer.full_weight() - layer.base.weight).norm())
    assert moved["lora", 64] < 0.3 * moved["lora", 1]
    assert 0.5 < moved["rslora", 64] / moved["rslora", 1] < 2.0


def test_a_packed_model_is_built_one_layer_at_a_time() -> None:
    """No more than a layer's weight is ever held in full beside what is packed."""
    cfg = replace(BASE, depth=8, width=256, adapter=AdapterConfig(base="nf4", rank=1))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _Storages() as seen,
    ):
        model = cfg.build(97, 0)
    packed = sum(
        p.nbytes for m in model.modules() if isinstance(m, FrozenLinear) for p in m.packed.values()
    )
    largest = max(m.num_frozen for m in model.modules() if isinstance(m, FrozenLinear))
    kept = sum(p.nbytes for p in model.parameters()) + packed
    assert seen.peak < kept + 4 * 8 * largest  # the weight, and what packing it takes
    assert seen.peak < 0.6 * 4 * BASE.__class__(**{**cfg.__dict__, "adapter": None}).num_parameters(
        97
    )


def test_a_recipe_quantises_the_products_below_the_adapters() -> None:
    nvfp4 = OperandConfig(format="nvfp4")
    recipe = PrecisionConfig(
        compute="bf16", fprop=FpropConfig(x=nvfp4, w=nvfp4), keep=("*.mlp.down",)
    )
    model = _adapted(rank=4)
    precision = recipe.build(torch.device("cpu"))
    precision.prepare(model)
    layers = adapted_layers(model)
    quantised = {name for name, m in layers.items() if isinstance(m.base, QuantisedLinear)}
    assert quantised == {name for name in layers if not name.endswith("mlp.down")}
    assert {choice.layer for choice in precision.table} == layers.keys()
    with precision.autocast(), torch.no_grad():
        assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize(("kind", "base"), [("lora", "nf4"), ("dora", "full"), ("dora", "nf4")])
def test_sharded_on_one_rank_is_unsharded(kind: Any, base: Any, tmp_path: Path) -> None:
    method = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    try:
        losses = []
        for shard in (False, True):
            model = _adapted(kind=kind, base=base, rank=4)
            if shard:
                Ranks("cpu").shard(model)
            base_loaded(model, like)
            losses.append(_learn(model))
    finally:
        dist.destroy_process_group()
    assert losses[0] == losses[1]
