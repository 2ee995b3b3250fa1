"""Recording a model's internals changes no bit and returns what the layers compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from analysis.internals import draw
from analysis.runs import from_folders
from models.branch import Context
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.engram_config import EngramConfig
from runner.commands.cli import app
from runner.evaluate.internals import induction, look, recording

NAMES = [chr(97 + i % 26) for i in range(50)]
SHAPES = {
    "rope, grouped": DecoderConfig(depth=2, width=32, num_heads=4, num_kv_heads=2, qk_norm=True),
    "gpt2": DecoderConfig(
        depth=2,
        width=32,
        num_heads=2,
        positions="learned",
        norm="layernorm",
        activation="gelu",
        bias=True,
        context_length=64,
    ),
    "mup": DecoderConfig(depth=2, width=64, num_heads=2, init="mup", base_width=32),
}
IDS = torch.randint(0, 50, (20,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Decoder:
    built = SHAPES[request.param].build(50, 0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(3.0)
    return built


def test_a_watched_pass_has_the_same_bits(model: Decoder) -> None:
    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(IDS[None, :-1], IDS[None, 1:]).total
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = step()
    with recording(model) as recorded:
        during = step()
    after = step()
    for other in (during, after):
        assert torch.equal(before[0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(before[1], other[1], strict=True))
    assert sorted(recorded.attention) == [0, 1]
    assert all("gradient_rms" in row for row in recorded.statistics.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_attention_maps_are_what_attention_computes(model: Decoder) -> None:
    with recording(model) as recorded:
        model(IDS[None])
    for layer, block in enumerate(model.blocks()):
        weights = recorded.attention[layer]
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        assert not weights.triu(1).any()
        x = torch.randn(1, 9, model.cfg.width, generator=torch.Generator().manual_seed(layer))
        attn = block.attn  # type: ignore[union-attr]
        places = torch.arange(9)
        context = Context(IDS[None, :9], places, rotary=model._rotary(places))
        _, _, v = attn._heads(x)  # type: ignore[operator]
        v = v.repeat_interleave(attn.num_heads // attn.num_kv_heads, dim=1)
        mixed = (attn.probabilities(x, context) @ v).transpose(1, 2).reshape(1, 9, -1)  # type: ignore[operator]
        torch.testing.assert_close(attn.out(mixed), attn(x, context), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_a_look_has_the_losses_and_the_lens_ends_at_the_model(model: Decoder) -> None:
    found = look(model, IDS, NAMES)
    logits = model(IDS[None])[0, :-1]
    expected = F.cross_entropy(logits, IDS[1:], reduction="none")
    torch.testing.assert_close(torch.tensor(found.losses), expected, rtol=1e-4, atol=1e-5)
    for place, (loss, rank) in enumerate(zip(found.losses, found.ranks, strict=True)):
        assert found.lens[-1][place]["true"] == pytest.approx(2.718281828**-loss, rel=1e-3)
        assert rank == int((logits[place] > logits[place, IDS[place + 1]]).sum())
        assert found.lens[-1][place]["says"] == NAMES[int(logits[place].argmax())]
    assert found.attention.shape == (2, model.cfg.num_heads, 20, 20)
    assert all(row["rms"] > 0 and row["gradient_rms"] > 0 for row in found.statistics)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="at least 2"):
        look(model, IDS[:1], NAMES)


def test_the_gates_of_a_memory_are_seen_by_token_and_drawn(tmp_path: Path) -> None:
    part = EngramConfig(table_size=31, slot_dim=4)
    cfg = DecoderConfig(depth=2, width=32, num_heads=2, pattern="naf af", parts={"n": part})
    model = cfg.build(50, 0)
    found = look(model, IDS, NAMES)
    assert list(found.gates) == [0]
    out = model(IDS[None, :-1], IDS[None, 1:])
    mean = sum(found.gates[0][:-1]) / (len(IDS) - 1)
    assert mean == pytest.approx(float(out.statistics["layers.0.engram.gate"]), abs=1e-6)
    made = draw(vars(found) | {"attention": found.attention.tolist()}, tmp_path, "a text")
    assert tmp_path / "gates.png" in made


def test_a_run_logs_how_its_heads_match_prefixes(
    espalier: Callable[..., Any], tmp_path: Path
) -> None:
    plain, watched = (
        espalier("name=a"),
        espalier("name=a", "eval.induction=true", f"root={tmp_path / 'w'}"),
    )
    assert (plain.returncode, watched.returncode) == (0, 0), watched.stderr
    one, two = (from_folders(root, "a").table.iloc[0] for root in (tmp_path, tmp_path / "w"))
    assert one["fingerprint"] == two["fingerprint"]
    assert one["val_loss"] == two["val_loss"]
    assert 0 <= two["prefix_matching/0.0"] <= 1
    assert "repeat_gain" in two
    assert "repeat_gain" not in one


def test_prefix_matching_finds_a_head_that_copies() -> None:
    """Learned position embeddings make a head attend to the token after the last occurrence."""
    length, width = 8, 64
    cfg = DecoderConfig(
        depth=1,
        width=width,
        num_heads=1,
        positions="learned",
        norm="layernorm",
        activation="gelu",
        bias=True,
        context_length=16,
    )
    model = cfg.build(30, 0)
    with torch.no_grad():
        model.embedding.weight.zero_()
        assert model.positions is not None
        model.positions.weight.zero_()
        for place in range(16):
            model.positions.weight[place, place] = 1.0
        attn = model.layers[0].attn  # type: ignore[union-attr]
        attn.qkv.weight.zero_()  # type: ignore[union-attr]
        attn.qkv.bias.zero_()  # type: ignore[union-attr]
        for place in range(16):
            attn.qkv.weight[width + place, place] = 20.0  # type: ignore[union-attr]  # keys: positions
            if place >= length:
                attn.qkv.weight[place - length + 1, place] = 20.0  # type: ignore[union-attr]
    assert induction(model, 30, length)["prefix_matching/0.0"] > 0.95
    plain = induction(DecoderConfig(depth=2, width=32, num_heads=2).build(30, 0), 30, 16)
    assert len(plain) == 5
    assert all(abs(value) < 0.1 for value in plain.values())


def test_the_command_draws_a_page_and_pictures(
    espalier: Callable[..., Any], tmp_path: Path
) -> None:
    assert espalier("name=x").returncode == 0
    key, root = next((tmp_path / "runs").iterdir()).name, ["--root", str(tmp_path)]
    done = CliRunner().invoke(app, ["look", key, "--text", "line <b>1", *root])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "looks" / key
    page = (folder / "look.html").read_text()
    assert "&lt;" in page
    assert "<b>1" not in page
    assert "gradient_rms" in page
    for name in ("attention.png", "attention.pdf", "losses.png"):
        assert (folder / name).stat().st_size > 3000
    assert len(json.loads((folder / "look.json").read_text())["losses"]) == len("line <b>1") - 1
    assert "at least 2" in str(
        CliRunner().invoke(app, ["look", key, "--text", "a", *root]).exception
    )
    assert "give either --text or --file" in str(
        CliRunner().invoke(app, ["look", key, *root]).exception
    )
