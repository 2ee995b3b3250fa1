import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml

from models.config import thaw
from models.decoder_config import DecoderConfig
from models.precision_config import PrecisionConfig
from runner.learn.config import TrainConfig
from runner.learn.optim.average_config import AverageConfig
from runner.learn.optim.groups_config import AdamWConfig, MuonConfig
from runner.learn.optim.schedule import ScheduleConfig
from runner.machine.errors import ConfigError
from tests.conftest import ROOT

MODEL = DecoderConfig(depth=2, width=16, num_heads=2)


@pytest.mark.parametrize("cfg", [AdamWConfig(), MuonConfig()], ids=["adamw", "muon"])
def test_every_parameter_has_one_optimiser_and_vectors_do_not_decay(cfg: AdamWConfig) -> None:
    model = MODEL.build(20, 0)
    optimizers = cfg.build(model)
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    for group in (g for o in optimizers for g in o.param_groups):
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_muon_steps_along_the_orthogonal_factor_of_the_gradient() -> None:
    """At the first step the momentum is along the gradient: the step is about U V^T."""
    model = MODEL.build(20, 0)
    muon = MuonConfig(weight_decay=0.0, muon_lr=1.0).build(model)[0]
    weight = model.layers[0].mlp.down.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    u, _, vt = torch.linalg.svd(weight.grad, full_matrices=False)
    muon.step()
    moved = (before - weight.detach()) / (0.2 * max(weight.shape) ** 0.5)
    inner = u.T @ moved @ vt.T
    assert inner.diagonal().min() > 0.6
    assert inner.diagonal().max() < 1.25
    assert (inner - inner.diagonal().diag()).abs().max() < 0.05


def test_schedules_at_their_corners() -> None:
    cosine = ScheduleConfig(kind="cosine", warmup=10, final=0.1)
    assert cosine.factor(0, 100) == pytest.approx(1 / 11)
    assert cosine.factor(10, 100) == pytest.approx(1.0)
    assert cosine.factor(99, 100) == pytest.approx(0.1)
    wsd = ScheduleConfig(kind="wsd", warmup=10, final=0.0, cooldown=0.2)
    assert wsd.factor(50, 100) == wsd.factor(78, 100) == 1.0
    assert 0.4 < wsd.factor(89, 100) < 0.6
    assert wsd.factor(99, 100) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (ScheduleConfig, {"warmup": 1000}, "warmup=1000 steps are more than the 500"),
        (ScheduleConfig, {"kind": "wsd", "warmup": 450}, "together are 550 steps"),
        (
            PrecisionConfig,
            {"compute": "bf16", "switch_at": 500.0},
            "switch_at=500 is never reached",
        ),
        (AverageConfig, {"kind": "last", "every": 200, "count": 3}, "do not fit into the 500"),
    ],
)
def test_what_does_not_fit_into_the_steps_is_refused(
    make: Callable[..., Any], keys: dict[str, Any], message: str
) -> None:
    cfg = make(**keys)  # a run of another length may have it
    cfg.check(1000)
    with pytest.raises(ValueError, match=message):
        cfg.check(500)
    with pytest.raises(ValueError, match="together are 650 steps"):
        ScheduleConfig(kind="wsd", warmup=0.5, cooldown=0.8).check(500)


@pytest.mark.parametrize(
    "budget", [{"tokens": 0}, {"flops": -1.0}, {"tokens_per_parameter": math.nan}, {"clip": 0.0}]
)
def test_a_budget_of_nothing_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be positive and finite"):
        TrainConfig(**budget).check(1)


@pytest.mark.parametrize("make", [ScheduleConfig, PrecisionConfig, AdamWConfig, MuonConfig])
def test_values_without_a_meaning_are_refused_by_name(make: Callable[..., Any]) -> None:
    keys = {
        ScheduleConfig: ("warmup=-1", "warmup=1.5", "final=2", "final=-0.1", "cooldown=1.5"),
        PrecisionConfig: ("switch_at=-1", "switch_at=10.5"),
        AdamWConfig: ("lr=0", "lr=inf", "eps=-1", "weight_decay=-0.1"),
        MuonConfig: ("lr=0", "muon_lr=-1", "momentum=1"),
    }
    for text in keys[make]:  # type: ignore[index]
        name, _, value = text.partition("=")
        for bad in (float(value), math.nan):
            with pytest.raises(ValueError, match=f"^{name}="):
                make(**{name: bad})


def test_every_part_of_a_schedule_that_fits_joins_without_a_jump() -> None:
    for warmup, cooldown in ((0.5, 0.5), (0.0, 1.0), (50, 0.5), (0.2, 0.3), (100, 0.0)):
        wsd = ScheduleConfig(kind="wsd", warmup=warmup, cooldown=cooldown, final=0.0)
        wsd.check(100)
        factors = [wsd.factor(step, 100) for step in range(100)]
        assert max(abs(b - a) for a, b in pairwise(factors)) < 0.05, (warmup, cooldown)


def test_muon_leaves_the_filters_of_convolutions_to_adamw() -> None:
    parts = {f.stem: yaml.safe_load(f.read_text()) for f in (ROOT / "conf/model/part").glob("*")}
    found = set()
    for name, part in parts.items():
        node = {"depth": 1, "width": 32, "num_heads": 2, "pattern": "x", "parts": {"x": part}}
        model = thaw(DecoderConfig, node).build(100, 0)
        muon, _ = MuonConfig().build(model)
        matrices = {id(p) for group in muon.param_groups for p in group["params"]}
        convolutions = [p for n, p in model.named_parameters() if n.split(".")[-1] == "conv"]
        assert not matrices & {id(p) for p in convolutions}
        found |= {name} if convolutions else set()
    assert {"short_conv", "long_conv", "mamba2", "gated_delta", "engram"} <= found


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 10_240}, 10),
        ({"flops": 3.2e5}, 20),
        ({"tokens_per_parameter": 2.0}, 2),
        ({}, 20),
    ],
)
def test_budgets_buy_steps(budget: dict[str, float], steps: int) -> None:
    """1,024 tokens a step, 1,024 parameters, 1,000 FLOPs a sequence of 64 tokens."""
    cfg = TrainConfig(sequence_length=64, batch_size=16, **budget)  # type: ignore[arg-type]
    assert cfg.num_steps(1024, 1000) == steps
