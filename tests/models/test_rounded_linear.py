"""Models that are trained rounded: what they compute is what is stored, to the bit."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.contract import for_inference, learning_rate_scales, logits, token_loss
from models.decoder_config import DecoderConfig
from models.pretrained import load_pretrained, load_weights, save_pretrained
from models.rounded_linear import plain_layers, rounded_layers
from models.rounding_config import RoundingConfig
from models.scheme import parse_scheme
from models.stored_linear import compress, decompress, stored_layers

PLAIN = DecoderConfig(depth=1, width=64, num_heads=2, hidden=96)
BITNET = RoundingConfig(weights="ternary", activations="int8", normed=True)
LSQ = RoundingConfig(weights="lsq", bits=3)
TORCHAO = RoundingConfig(weights="torchao", bits=4, group=32)
TOKENS = torch.arange(24).view(2, 12)
AS_TRAINED = parse_scheme("as-trained")


@pytest.mark.parametrize(
    ("rounding", "bits"), [(BITNET, 2.1), (LSQ, 3.1), (TORCHAO, 5.1)], ids=["bitnet", "lsq", "ao"]
)
def test_a_model_trained_rounded_learns_and_is_stored_with_equal_logits(
    rounding: RoundingConfig, bits: float
) -> None:
    if rounding.weights == "torchao":
        pytest.importorskip("torchao", reason="rounds as torchao does: pip install torchao")
    cfg = replace(PLAIN, rounding=rounding)
    model = cfg.build(64, 0)
    assert cfg.num_parameters(64) == sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = token_loss(model, TOKENS, TOKENS.roll(-1, 1)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    before = _logits(model)
    assert not torch.equal(before, _logits(_in_full(model)))
    decoding = for_inference(copy.deepcopy(model))
    torch.testing.assert_close(_logits(decoding), before, rtol=1e-5, atol=1e-5)
    stored, other = copy.deepcopy(model), cfg.build(64, 1)
    compress(stored, AS_TRAINED)
    assert torch.equal(_logits(stored), before)
    layers = stored_layers(stored).values()
    assert 8 * sum(s.num_bytes() for s in layers) < bits * sum(s.num_frozen for s in layers)
    compress(other, AS_TRAINED)
    other.load_state_dict(stored.state_dict())
    assert torch.equal(_logits(other), before)
    torch.testing.assert_close(_logits(for_inference(other)), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="trained rounded, and would be rounded anew; take scheme"):
        compress(model, parse_scheme("int4-g32"))


def test_weights_alone_become_plain_layers_and_inputs_too_do_not(tmp_path: Path) -> None:
    model = replace(PLAIN, rounding=LSQ).build(64, 0)
    before = _logits(model)
    save_pretrained(plain_layers(copy.deepcopy(model)), tmp_path / "lsq", layout="llama")
    assert torch.equal(_logits(load_pretrained(tmp_path / "lsq")), before)
    stored = copy.deepcopy(model)
    compress(stored, AS_TRAINED)
    assert torch.equal(_logits(decompress(stored)), before)
    assert stored.cfg.rounding is None
    bitnet = replace(PLAIN, rounding=BITNET).build(64, 0)
    save_pretrained(plain_layers(bitnet), tmp_path / "bitnet")
    assert torch.equal(_logits(load_pretrained(tmp_path / "bitnet")), _logits(bitnet))
    compress(bitnet, AS_TRAINED)
    with pytest.raises(ValueError, match=r"round their inputs too.*export the run"):
        decompress(bitnet)


def test_the_steps_of_a_model_trained_in_full_begin_by_its_weights(tmp_path: Path) -> None:
    full, rounded = PLAIN.build(64, 1), replace(PLAIN, rounding=LSQ).build(64, 0)
    save_pretrained(full, tmp_path)
    load_weights(tmp_path, rounded)
    name, layer = next(iter(rounded_layers(rounded).items()))
    mean = full.get_submodule(name).weight.detach().abs().mean()
    torch.testing.assert_close(layer.step.detach(), (2 * mean / 3**0.5).view(1))
    assert learning_rate_scales(rounded)[f"{name}.step"] == 0.01


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="not trained rounded; take another scheme, or train with"):
        compress(PLAIN.build(64, 0), AS_TRAINED)
    with pytest.raises(ValueError, match="must be a config with its _target_"):
        replace(PLAIN, rounding="bitnet")
    with pytest.raises(ValueError, match=r"rounding.bits=9 must lie between 2 and 8"):
        replace(LSQ, bits=9)


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return logits(model, TOKENS)


def _in_full(model: torch.nn.Module) -> torch.nn.Module:
    full = PLAIN.build(64, 0)
    names = full.state_dict().keys()
    full.load_state_dict({n: t for n, t in model.state_dict().items() if n in names})
    return full
