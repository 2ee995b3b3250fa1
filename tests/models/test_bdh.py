"""BDH: the public forward pass, its recurrence, and its form in chunks."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.philox import NoiseKey
from models.bdh import BDH
from models.bdh_config import BDHConfig
from tests.models import backbone

SMALL = BDHConfig(depth=3, width=32, num_heads=2, multiplier=4, dropout=0.0)
KINDS = {"repo": SMALL, "paper": replace(SMALL, form="paper"), "chunks": replace(SMALL, chunks=4)}


def test_it_has_the_published_number_of_parameters() -> None:
    assert BDHConfig().num_parameters(256) == 25_296_896


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_satisfies_the_claims_of_all_models(kind: str, tmp_path: Path) -> None:
    backbone.satisfies_all_claims(KINDS[kind], tmp_path / "m", bound=1e-4, flops=kind != "chunks")


@pytest.mark.slow
def test_all_compile() -> None:
    backbone.compiles(*(replace(cfg, depth=2) for cfg in KINDS.values()))


@torch.no_grad()
def _public_forward(model: BDH, tokens: torch.Tensor) -> torch.Tensor:
    """The public code's forward pass, restated from its description with its own weight shapes."""
    cfg, level = model.cfg, model.level
    heads, n, dim = cfg.num_heads, cfg.neurons, cfg.width
    encoder = level.encoder.weight.view(heads, n, dim).transpose(1, 2)
    encoder_v = torch.stack([w.weight.T for w in level.encoder_v])
    decoder = level.decoder.weight.T
    frequencies = 1.0 / (65536.0 ** (2 * (torch.arange(n) // 2) / n)) / (2 * math.pi)
    batch, seq = tokens.shape
    phases = ((torch.arange(seq)[:, None] * frequencies) % 1) * (2 * math.pi)

    def rope(v: torch.Tensor) -> torch.Tensor:
        turned = torch.stack((-v[..., 1::2], v[..., ::2]), dim=-1).view(*v.size())
        return v * phases.cos() + turned * phases.sin()

    def ln(v: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(v, (dim,))

    x = ln(model.embedding.weight[tokens].unsqueeze(1))
    for _ in range(cfg.depth):
        x_sparse = F.relu(x @ encoder)
        turned = rope(x_sparse)
        y_kv = ln((turned @ turned.mT).tril(diagonal=-1) @ x)
        xy = x_sparse * F.relu(y_kv @ encoder_v)
        y_mlp = xy.transpose(1, 2).reshape(batch, 1, seq, n * heads) @ decoder
        x = ln(x + ln(y_mlp))
    return x.view(batch, seq, dim) @ model.head.weight.T


@pytest.mark.parametrize("kind", ["repo", "chunks"])
def test_its_logits_are_those_of_the_public_code(kind: str) -> None:
    model = backbone.perturbed(KINDS[kind])
    assert isinstance(model, BDH)
    tokens = backbone.text(2, 40)
    with torch.no_grad():
        logits = model(tokens)
    torch.testing.assert_close(logits, _public_forward(model, tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_papers_form_is_its_recurrence() -> None:
    """Token by token with the state rho, as the paper writes it."""
    model = backbone.perturbed(KINDS["paper"])
    assert isinstance(model, BDH)
    cfg, level, tokens = model.cfg, model.level, backbone.text(1, 12)
    heads, n = cfg.num_heads, cfg.neurons
    rho = torch.zeros(cfg.depth, heads, n, cfg.width)
    frequencies = 1.0 / (65536.0 ** (2 * (torch.arange(n) // 2) / n))
    logits = []
    for position, token in enumerate(tokens[0]):
        angle = position * frequencies
        v = F.layer_norm(model.embedding.weight[token], (cfg.width,))
        x = torch.zeros(heads, n)
        for index in range(cfg.depth):
            x = x + F.relu((level.encoder.weight @ v).view(heads, n))
            other = torch.stack((-x[:, 1::2], x[:, ::2]), dim=-1).view(heads, n)
            key = x * angle.cos() + other * angle.sin()
            a = torch.einsum("hn,hnd->hd", key, rho[index])
            rho[index] += key[:, :, None] * v
            gate = torch.stack(
                [w(h) for w, h in zip(level.encoder_v, F.layer_norm(a, (cfg.width,)), strict=True)]
            )
            v = F.layer_norm(level.decoder.weight @ (F.relu(gate) * x).flatten(), (cfg.width,))
        logits.append(model.head.weight @ v)
    torch.testing.assert_close(model(tokens)[0], torch.stack(logits), rtol=1e-3, atol=1e-3)


def test_chunks_change_neither_loss_nor_gradient_under_dropout() -> None:
    tokens = backbone.text(3, 33)
    noise = NoiseKey(seed=0, step=4, samples=torch.arange(3))
    results = []
    for chunks in (1, 2, 8):
        model = backbone.perturbed(replace(SMALL, chunks=chunks, dropout=0.2))
        out = model(tokens[:, :-1], tokens[:, 1:], noise=noise)
        out.total.backward()
        results.append([out.nll.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_it_says_how_many_neurons_are_active() -> None:
    tokens = backbone.text(2, 17)
    out = backbone.perturbed(SMALL)(tokens[:, :-1], tokens[:, 1:])
    assert set(out.statistics) == {f"levels.{i}.{s}_active" for i in range(3) for s in "xy"}
    assert all(0.1 < float(value) < 0.9 for value in out.statistics.values())


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_it_trains_under_low_precision(recipe: str) -> None:
    backbone.trains_under(SMALL, recipe)


def test_chunks_under_a_quantised_recipe_are_refused() -> None:
    with pytest.raises(ValueError, match="chunks=1"):
        backbone.trains_under(KINDS["chunks"], "nvfp4")


@pytest.mark.parametrize("bad", [{"chunks": 3}, {"chunks": 2, "form": "paper"}, {"multiplier": 1}])
def test_impossible_shapes_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        BDHConfig(**{"width": 32, "num_heads": 4} | bad)
