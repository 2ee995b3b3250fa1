"""Branches whose state does not grow: training in chunks or by a scan equals decoding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.short_conv import long_conv, short_conv
from models.convolution_config import ConvolutionConfig
from models.decoder_config import DecoderConfig
from models.linear_attention import taylor
from models.linear_attention_config import LinearAttentionConfig
from models.mamba_config import MambaConfig
from models.min_gru_config import MinGRUConfig
from tests.models import backbone

KINDS: dict[str, Any] = {
    "gla": LinearAttentionConfig(kind="gla", chunk=8),
    "gla, no conv": LinearAttentionConfig(kind="gla", conv=0, num_heads=2, key_dim=6),
    "delta": LinearAttentionConfig(kind="delta", chunk=8),
    "gated delta": LinearAttentionConfig(kind="gated_delta", chunk=16),
    "based": LinearAttentionConfig(kind="based", key_dim=4, conv=3),
    "mamba": MambaConfig(state_dim=8, head_dim=16, chunk=8),
    "minGRU": MinGRUConfig(expand=1.5),
    "short conv": ConvolutionConfig(),
    "long conv": ConvolutionConfig(taps=40),
}


def _cfg(kind: str, **more: Any) -> DecoderConfig:
    base = {"depth": 2, "width": 32, "num_heads": 4, "pattern": "xf", "parts": {"x": KINDS[kind]}}
    return DecoderConfig(**base | more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_satisfies_the_claims_of_all_models(kind: str, tmp_path: Path) -> None:
    # The FFT of a long convolution carries rounding from later positions to earlier ones.
    causal = 1e-5 if kind == "long conv" else 1e-6
    backbone.satisfies_all_claims(_cfg(kind), tmp_path / "m", bound=1e-4, causal=causal)
    backbone.has_the_flops_of_its_formula(_cfg(kind), 29)


@pytest.mark.slow
def test_all_compile() -> None:
    backbone.compiles(*(_cfg(kind, depth=1) for kind in KINDS))


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
@pytest.mark.parametrize("kind", ["gla", "gated delta", "based", "mamba", "minGRU", "short conv"])
def test_they_train_under_low_precision(kind: str, recipe: str) -> None:
    backbone.trains_under(_cfg(kind), recipe)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_does_not_grow(kind: str) -> None:
    model = _cfg(kind).build(50, 0)
    state, sizes = model.start(2, 8), []
    with torch.no_grad():
        for size in (7, 60, 1):
            model(backbone.text(2, size), state=state)
            sizes.append(state.num_bytes())
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.slow
def test_a_hybrid_keeps_a_window_and_states_together(tmp_path: Path) -> None:
    from models.attention_config import AttentionConfig
    from models.engram_config import EngramConfig
    from models.experts_config import ExpertsConfig
    from models.streams_config import StreamsConfig

    cfg = _cfg(
        "gated delta",
        depth=3,
        pattern="nxe wm af",
        streams=StreamsConfig(num_streams=2),
        parts={
            "x": KINDS["gated delta"],
            "m": KINDS["mamba"],
            "w": AttentionConfig(window=6, sinks=1),
            "n": EngramConfig(table_size=31, slot_dim=2),
            "e": ExpertsConfig(num_experts=4, hidden=16, balance="none", z_loss=0.0),
        },
    )
    backbone.satisfies_all_claims(cfg, tmp_path / "m", bound=1e-4)
    few = {letter: part for letter, part in cfg.parts.items() if letter in "xe"}
    small = replace(cfg, depth=1, pattern="xe", parts=few, streams=None)
    backbone.compiles(small, backend="inductor")


def test_taylor_features_are_the_expansion_of_exp() -> None:
    x, y = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    product = (x * y).sum(-1)
    torch.testing.assert_close((taylor(x) * taylor(y)).sum(-1), 1 + product + product**2 / 2)


def test_a_long_convolution_is_the_short_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30 + 11, 3, generator=generator)
    weight = torch.randn(3, 12, generator=generator)
    torch.testing.assert_close(long_conv(x, weight), short_conv(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (LinearAttentionConfig(num_heads=5), "num_heads=5"),
        (MambaConfig(head_dim=48), "head_dim=48"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(part: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DecoderConfig(depth=1, width=32, num_heads=4, pattern="x", parts={"x": part}).build(50, 0)
