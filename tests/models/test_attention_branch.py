"""Attention as a branch: windows, sinks, their caches; patterns; what looks both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.attention import Attention
from models.attention_config import AttentionConfig
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.layers_config import FeedForwardConfig
from models.min_gru_config import MinGRUConfig
from tests.models import backbone

BASE: dict[str, Any] = {"depth": 2, "width": 32, "num_heads": 4}
KINDS: dict[str, AttentionConfig] = {
    "mqa": AttentionConfig(num_kv_heads=1),
    "window": AttentionConfig(window=5),
    "window, sinks": AttentionConfig(window=5, sinks=2, num_kv_heads=2),
    "reindexed": AttentionConfig(window=5, sinks=2, reindex=True),
    "learned sink": AttentionConfig(learned_sink=True),
    "window, learned sink": AttentionConfig(window=6, learned_sink=True),
}


def _cfg(kind: str, **more: Any) -> DecoderConfig:
    return DecoderConfig(**BASE | {"pattern": "wf", "parts": {"w": KINDS[kind]}} | more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_satisfies_the_claims_of_all_models(kind: str, tmp_path: Path) -> None:
    backbone.satisfies_all_claims(_cfg(kind), tmp_path / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_stack_comes_back_from_a_folder(kind: str, tmp_path: Path) -> None:
    backbone.comes_back_from_a_folder(_cfg(kind, depth=3, pattern="wf af"), tmp_path / "m")


@pytest.mark.slow
def test_all_compile() -> None:
    backbone.compiles(*(_cfg(kind, depth=1) for kind in KINDS))


@pytest.mark.parametrize("kind", ["window", "window, sinks", "reindexed"])
def test_a_layer_sees_its_window_and_its_sinks_and_nothing_else(kind: str) -> None:
    """In one layer, token t depends on token s exactly where s is near or a sink."""
    model = backbone.perturbed(_cfg(kind, depth=1))
    part, tokens = KINDS[kind], backbone.text(1, 14)
    with torch.no_grad():
        base = model(tokens)
        for changed in range(14):
            other = tokens.clone()
            other[:, changed] = (other[:, changed] + 1) % backbone.VOCAB
            moved = (model(other) - base)[0].abs().amax(dim=-1)
            for query in range(14):
                near = query - changed < part.window or changed < part.sinks  # type: ignore[operator]
                sees = changed <= query and near
                assert bool(moved[query] > 1e-6) == sees, (changed, query)


def test_a_cache_holds_no_more_than_its_heads_and_window_show() -> None:
    def state_bytes(**part: Any) -> int:
        cfg = DecoderConfig(**BASE | {"pattern": "w", "parts": {"w": AttentionConfig(**part)}})
        model = cfg.build(50, 0)
        state = model.start(2, 64)
        model(backbone.text(2, 60), state=state)
        return state.num_bytes()

    full = state_bytes()
    assert full == 2 * 2 * 64 * 32 * 4 * 2  # layers, rows, positions, width, bytes, keys and values
    assert state_bytes(num_kv_heads=2) * 2 == full
    assert state_bytes(num_kv_heads=1) * 4 == full
    assert state_bytes(window=8) == full // 8 + 2 * 2 * 8 * 8  # ... and the position of each slot


def test_reindexed_positions_are_those_of_the_published_cache() -> None:
    """StreamingLLM's procedure: number the keys of sinks and window from 0, rotate, attend."""
    model = backbone.perturbed(_cfg("reindexed", depth=1, pattern="w"))
    assert isinstance(model, Decoder)
    tokens = backbone.text(1, 20)
    attn = model.layers[0].attn
    seen: list[torch.Tensor] = []
    handle = attn.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(tokens)
        handle.remove()
        x = model.layers[0].attn_norm(model.embedding(tokens))
        q, k, v = attn._heads(x)
        from kernels.rotary import rotate

        cached = [0, 1, 15, 16, 17, 18, 19]
        tables = model._rotary_at(torch.arange(7))
        last = model._rotary_at(torch.tensor([6]))
        scores = rotate(q[:, :, 19:], *last) @ rotate(k[:, :, cached], *tables).transpose(-1, -2)
        y = (scores * attn.scale).softmax(-1) @ v[:, :, cached]
        expected = attn.out(y.transpose(1, 2).reshape(1, 1, -1))
    torch.testing.assert_close(seen[0][:, 19:], expected, rtol=1e-5, atol=1e-5)


def test_a_learned_sink_takes_attention_and_gives_nothing() -> None:
    model = backbone.perturbed(_cfg("learned sink"))
    with torch.no_grad():
        for layer in model.blocks():
            layer.attn.sink.fill_(-1e9)
        plain = backbone.perturbed(_cfg("learned sink"))
        for layer in plain.blocks():
            layer.attn.sink = None
        torch.testing.assert_close(
            model(backbone.text(1, 9)), plain(backbone.text(1, 9)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_that_forward_computes(kind: str) -> None:
    model = backbone.perturbed(_cfg(kind, depth=1, pattern="w"))
    attn, given = model.blocks()[0].attn, []
    assert isinstance(attn, Attention)
    with torch.no_grad():
        handle = attn.register_forward_pre_hook(lambda _m, args: given.extend(args))
        hooked = attn.register_forward_hook(lambda _m, _a, out: given.append(out))
        model(backbone.text(2, 13))
        handle.remove()
        hooked.remove()
        x, context, out = given
        weights = attn.probabilities(x, context)
        v = attn._heads(x)[2].repeat_interleave(attn.num_heads // attn.num_kv_heads, dim=1)
        y = attn.out((weights @ v).transpose(1, 2).reshape(2, 13, -1))
    torch.testing.assert_close(y, out, rtol=1e-5, atol=1e-5)


def test_without_causality_every_token_sees_every_other() -> None:
    cfg = DecoderConfig(**BASE, causal=False)
    model = backbone.perturbed(cfg)
    tokens = backbone.text(1, 12)
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % backbone.VOCAB
    with torch.no_grad():
        assert ((model(tokens) - model(other)).abs().amax(dim=-1) > 1e-6).all()
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in DecoderConfig(**BASE).build(50, 0).named_parameters()
    }
    with pytest.raises(NotImplementedError, match="causal=false"):
        model.start(1, 8)


def test_a_word_of_the_pattern_is_a_layer_and_words_go_round() -> None:
    cfg = DecoderConfig(
        **BASE | {"depth": 3, "pattern": "af a", "parts": {"g": FeedForwardConfig(hidden=8)}}
    )
    names = [[part.name for part in layer] for layer in cfg.branches()]
    assert names == [["attn", "mlp"], ["attn"], ["attn", "mlp"]]
    model = cfg.build(50, 0)
    assert not hasattr(model.layers[1], "mlp")


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"pattern": "ax"}, "'x' is no part; there are: a, f"),
        ({"pattern": ""}, "has no layer"),
        ({"pattern": "aa"}, "a letter twice"),
        ({"pattern": "aw", "parts": {"w": AttentionConfig(window=3)}}, "two branches of one kind"),
        ({"parts": {"ww": AttentionConfig()}}, "parts.ww"),
        ({"parts": {"w": 3}}, "_target_"),
        ({"streams": {"kind": "hc"}}, "conf/model/streams"),
        ({"pattern": "rf", "parts": {"r": MinGRUConfig()}, "causal": False}, "'r' looks back only"),
    ],
)
def test_impossible_patterns_are_refused(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DecoderConfig(**BASE | bad)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"window": 0}, "window=0"),
        ({"sinks": 2}, "sinks=2"),
        ({"window": 4, "reindex": True}, "reindex"),
    ],
)
def test_impossible_attention_is_refused(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AttentionConfig(**bad)
