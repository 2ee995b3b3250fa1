"""Hyper-connections: at first the plain residual, mixing that mixes, gains that stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.decoder_config import DecoderConfig
from models.streams import HyperConnection, sinkhorn
from models.streams_config import StreamsConfig
from tests.models import backbone

PLAIN = DecoderConfig(depth=3, width=32, num_heads=4)
KINDS = ("mhc", "hc")
GAINS = ("amax_forward", "amax_backward", "min_column_sum")


def _cfg(kind: str, **more: Any) -> DecoderConfig:
    return replace(PLAIN, streams=StreamsConfig(kind=kind), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_satisfies_the_claims_of_all_models(kind: str, tmp_path: Path) -> None:
    backbone.satisfies_all_claims(_cfg(kind), tmp_path / "m")


@pytest.mark.slow
def test_all_compile() -> None:
    backbone.compiles(*(_cfg(kind, depth=1) for kind in KINDS))


@pytest.mark.parametrize(("kind", "bound"), [("hc", 1e-5), ("mhc", 0.02)])
def test_at_the_start_it_is_the_plain_residual(kind: str, bound: float) -> None:
    """Every stream is x; mHC reads 1.04 x, which the norm undoes, and mixes a thousandth."""
    tokens = backbone.text(2, 12)
    with torch.no_grad():
        plain, several = (cfg.build(50, 0)(tokens) for cfg in (PLAIN, _cfg(kind)))
    assert float((plain - several).abs().max() / plain.abs().max()) < bound


def _connection(kind: str) -> tuple[HyperConnection, torch.Tensor]:
    connection = backbone.perturbed(_cfg(kind)).blocks()[1].attn_streams
    assert isinstance(connection, HyperConnection)
    return connection, torch.randn(2, 5, 4, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_formula_token_by_token(kind: str) -> None:
    connection, x = _connection(kind)
    given, gates = connection.read(x, _no_context())
    out = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    after = connection.write(x, out, gates)
    alpha, bias = connection.alpha, connection.bias
    for b in range(2):
        for t in range(5):
            here = x[b, t]
            if kind == "hc":
                normed = here / here.square().mean(-1, keepdim=True).sqrt()
                raw = torch.tanh(normed @ connection.weight.T)
                pre, post = alpha[0] * raw[:, 0] + bias[:4], alpha[1] * raw[:, 1] + bias[4:8]
                res = alpha[2] * raw[:, 2:] + bias[8:].view(4, 4)
            else:
                flat = here.flatten() / here.square().mean().sqrt()
                raw = connection.weight @ flat
                pre = torch.sigmoid(alpha[0] * raw[:4] + bias[:4])
                post = 2 * torch.sigmoid(alpha[1] * raw[4:8] + bias[4:8])
                res = (alpha[2] * raw[8:] + bias[8:]).view(4, 4).exp()
                for _ in range(20):
                    res = res / res.sum(0, keepdim=True)
                    res = res / res.sum(1, keepdim=True)
            torch.testing.assert_close(
                given[b, t], sum(pre[j] * here[j] for j in range(4)), rtol=1e-4, atol=1e-4
            )
            for i in range(4):
                expected = sum(res[i, j] * here[j] for j in range(4)) + post[i] * out[b, t]
                torch.testing.assert_close(after[b, t, i], expected, rtol=1e-4, atol=1e-4)


def _no_context() -> Any:
    from models.branch import Context

    return Context(torch.zeros(2, 5, dtype=torch.long), torch.arange(5))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_order_of_streams_matters(kind: str) -> None:
    """Mixing that contracts nothing, a known mistake, would give each stream only itself."""
    connection, x = _connection(kind)
    _, gates = connection.read(x, _no_context())
    out = torch.zeros(2, 5, 32)
    one = connection.write(x, out, gates)
    other = connection.write(x[:, :, [1, 0, 2, 3]], out, gates)
    assert float((one - other)[:, :, 2:].abs().max()) > (1e-2 if kind == "hc" else 1e-4)


def test_mixing_is_doubly_stochastic() -> None:
    logits = 3 * torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(0))
    mixing = sinkhorn(logits, 20)
    torch.testing.assert_close(mixing.sum(-1), torch.ones(64, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixing.sum(-2), torch.ones(64, 4), rtol=0, atol=0.05)
    assert (mixing > 0).all()


def test_gains_are_those_of_the_product_of_all_mixing() -> None:
    model = backbone.perturbed(_cfg("hc"))
    seen: list[torch.Tensor] = []
    for block in model.blocks():
        for name in ("attn_streams", "mlp_streams"):
            connection = getattr(block, name)
            plain = connection.read

            def read(x: Any, context: Any, plain: Any = plain) -> Any:
                given, gates = plain(x, context)
                seen.append(gates[0].detach())
                return given, gates

            connection.read = read
    tokens = backbone.text(2, 9)
    out = model(tokens[:, :-1], tokens[:, 1:])
    product = torch.eye(4)
    for res in seen:
        product = res @ product
    gains = {name: float(out.statistics[f"streams.{name}"]) for name in GAINS}
    rows, columns = product.sum(-1), product.sum(-2)
    assert gains["amax_forward"] == pytest.approx(float(rows.abs().max()), rel=1e-4)
    assert gains["amax_backward"] == pytest.approx(float(columns.abs().max()), rel=1e-4)
    assert gains["min_column_sum"] == pytest.approx(float(columns.min()), rel=1e-3, abs=1e-5)


def test_mhc_starts_with_gains_of_one_however_deep() -> None:
    tokens = backbone.text(2, 9)
    out = _cfg("mhc", depth=24).build(50, 0)(tokens[:, :-1], tokens[:, 1:])
    for side in ("forward", "backward"):
        assert 0.99 < float(out.statistics[f"streams.amax_{side}"]) <= 1.05
    assert float(out.statistics["streams.min_column_sum"]) > 0.95


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_it_trains_under_low_precision(recipe: str) -> None:
    backbone.trains_under(_cfg("mhc", hidden=64), recipe)


@pytest.mark.parametrize("bad", [{"num_streams": 0}, {"iterations": 0}])
def test_impossible_streams_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        StreamsConfig(**bad)
