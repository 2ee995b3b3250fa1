"""The mixture of experts: choice, sorting, balance; test_pretrained.py compares with Mixtral."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.grouped import grouped_feed_forward
from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from models.experts import Experts
from models.experts_config import ExpertsConfig
from tests.models import backbone

KINDS: dict[str, dict[str, Any]] = {
    "top 2": {},
    "top 1, unnormalised": {"top_k": 1, "normalise": False},
    "after, shared": {"softmax": "after", "shared": 1, "hidden": 16},
    "bias": {"balance": "bias", "top_k": 2},
}
NOISE = NoiseKey(seed=0, step=0, samples=torch.arange(4))


def _cfg(kind: str, **more: Any) -> DecoderConfig:
    part = ExpertsConfig(num_experts=5, **KINDS[kind] | more)
    return DecoderConfig(depth=2, width=32, num_heads=4, pattern="ae", parts={"e": part})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_satisfies_the_claims_of_all_models(kind: str, tmp_path: Path) -> None:
    """The load is that of a micro-batch, so halves are compared without losses on it."""
    unbalanced = _cfg(kind, balance="none", z_loss=0.0)
    backbone.satisfies_all_claims(_cfg(kind), tmp_path / "m", in_halves=unbalanced)


@pytest.mark.slow
def test_all_compile() -> None:
    backbone.compiles(*(replace(_cfg(kind), depth=1) for kind in KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_weighted_sum_of_the_chosen_experts(kind: str) -> None:
    """Token by token, expert by expert, by the definition."""
    experts = backbone.perturbed(_cfg(kind)).blocks()[0].moe
    assert isinstance(experts, Experts)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, _ = experts(x, _context())
        for row, y in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
            scores = row @ experts.router.T
            ranked = scores if experts.balance is None else scores.softmax(-1) + experts.balance
            chosen = sorted(range(5), key=lambda e: -float(ranked[e]))[: experts.cfg.top_k]
            if experts.cfg.softmax == "after":
                share = scores[chosen].softmax(-1)
            else:
                share = scores.softmax(-1)[chosen]
                share = share / share.sum() if experts.cfg.normalise else share
            expected = sum(w * experts.experts[e](row) for w, e in zip(share, chosen, strict=True))
            if experts.shared is not None:
                expected = expected + experts.shared(row)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def _context(noise: NoiseKey | None = None) -> Any:
    from models.branch import Context

    return Context(torch.zeros(4, 8, dtype=torch.long), torch.arange(8), noise=noise)


def test_beyond_its_capacity_an_expert_drops_tokens_and_counts_them() -> None:
    experts = backbone.perturbed(_cfg("top 1, unnormalised", capacity_factor=1.0)).blocks()[0].moe
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen = (x.flatten(0, 1) @ experts.router.T).argmax(-1)
        out, notes = experts(x, _context(NOISE))
        free, none = experts(x, _context())  # evaluation drops nothing
    capacity, seen, dropped = 8, [0] * 5, []
    for expert in chosen.tolist():
        seen[expert] += 1
        dropped.append(seen[expert] > capacity)
    assert 0 < sum(dropped) == round(float(notes["drop_rate"]) * 40)
    assert float(none["drop_rate"]) == 0.0
    for row, is_dropped in enumerate(dropped):
        y = out.flatten(0, 1)[row]
        assert not y.any() if is_dropped else torch.allclose(y, free.flatten(0, 1)[row], atol=1e-6)


def test_notes_on_the_load_follow_their_formulas() -> None:
    experts = backbone.perturbed(_cfg("top 1, unnormalised")).blocks()[0].moe
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0))
    scores = x.flatten(0, 1) @ experts.router.T
    load = F.one_hot(scores.argmax(-1), 5).double().mean(0)
    _, notes = experts(x, _context())
    assert float(notes["max_violation"]) == pytest.approx(float(load.max() * 5 - 1), rel=1e-5)
    entropy = -sum(p * p.log() for p in load if p > 0) / torch.tensor(5.0).log()
    assert float(notes["load_entropy"]) == pytest.approx(float(entropy), rel=1e-5)
    balance = (0.01 * 5 * (load * scores.softmax(-1).mean(0)).sum()).detach()
    assert float(notes["loss.balance"].detach()) == pytest.approx(float(balance), rel=1e-5)
    assert not any(value.requires_grad for name, value in notes.items() if "loss" not in name)
    notes = {name: value.detach() for name, value in notes.items()}
    z = (1e-3 * scores.logsumexp(-1).square().mean()).detach()
    assert float(notes["loss.z"]) == pytest.approx(float(z), rel=1e-5)


def test_auxiliary_losses_are_in_the_total_and_not_in_the_loss_of_a_token() -> None:
    tokens = backbone.text(2, 17)
    cfg = _cfg("top 2")
    model = backbone.perturbed(cfg)
    out = model(tokens[:, :-1], tokens[:, 1:])
    parts = [value for name, value in out.statistics.items() if ".loss." in name]
    assert len(parts) == 4  # two layers, two losses
    torch.testing.assert_close(out.total, out.nll.sum() + 32 * sum(parts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_balancing_removes_an_overload(balance: str) -> None:
    """Most tokens prefer one expert; training the balancing alone spreads them."""
    part = ExpertsConfig(num_experts=8, top_k=1, hidden=16, balance=balance, z_loss=0.0)  # type: ignore[arg-type]
    host = DecoderConfig(depth=1, width=32, num_heads=4, pattern="ae", parts={"e": part})
    experts = host.build(50, 0).blocks()[0].moe
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        experts.router.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        experts.router[0] += 0.1
    moved = [experts.router] if balance == "loss" else [experts.balance]
    optimizer = torch.optim.AdamW(moved, lr=1e-3, weight_decay=0.0)
    overload = []
    for _ in range(400):
        _, notes = experts(x, _context())
        notes["loss.bias" if balance == "bias" else "loss.balance"].backward()
        optimizer.step()
        optimizer.zero_grad()
        overload.append(float(notes["max_violation"]))
    assert overload[0] > 2.5
    assert overload[-1] < 0.3 * overload[0], overload[::50]


def test_an_expert_without_a_token_has_a_gradient_of_zero() -> None:
    """With several processes DDP would wait for ever for a missing gradient."""
    model = _cfg("top 1, unnormalised").build(50, 0)
    tokens = backbone.text(1, 3)
    model(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_it_trains_under_low_precision(recipe: str) -> None:
    part = ExpertsConfig(num_experts=24)  # some get an odd number of tokens, some none
    cfg = DecoderConfig(depth=2, width=32, num_heads=2, hidden=32, pattern="ae", parts={"e": part})
    backbone.trains_under(cfg, recipe)


def test_the_grouped_product_is_the_loop_over_experts() -> None:
    """torch has it on CPUs too, as a loop of its own; an empty group among them."""
    counts = torch.tensor([5, 0, 3])
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(s, generator=generator) for s in ((8, 16), (3, 24, 16), (3, 16, 24)))
    grouped = grouped_feed_forward(x, up, down, counts, F.gelu)
    parts = [
        F.gelu(part @ u.T) @ d.T for part, u, d in zip(x.split([5, 0, 3]), up, down, strict=True)
    ]
    torch.testing.assert_close(grouped, torch.cat(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "match"), [({"top_k": 6}, "top_k=6"), ({"capacity_factor": 0.0}, "capacity_factor")]
)
def test_impossible_mixtures_are_refused(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ExpertsConfig(num_experts=5, **bad)
