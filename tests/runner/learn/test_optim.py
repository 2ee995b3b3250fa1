import pytest
import torch

from models.decoder_config import DecoderConfig
from runner.learn.config import TrainConfig
from runner.learn.optim.groups_config import AdamWConfig, MuonConfig
from runner.learn.optim.schedule import ScheduleConfig

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
