"""The FLOPs of training with frozen weights are those that torch's counter sees."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.adapter_config import AdapterConfig
from models.decoder_config import DecoderConfig
from models.encoder_decoder_config import EncoderDecoderConfig
from models.medusa_config import MedusaConfig
from models.sizes import forward_flops_per_sequence, training_flops_per_sequence

VOCAB, SEQ = 97, 16
DECODER = DecoderConfig(depth=4, width=64, num_heads=4, activation="swiglu", norm="rmsnorm")
T5 = EncoderDecoderConfig(
    dim=64, head_dim=16, hidden=96, num_heads=4, encoder_layers=2, decoder_layers=2
)


def _counted(cfg: Any, output: Callable[[Any, Tensor], Tensor]) -> int:
    """Return the FLOPs of a forward and a backward pass over SEQ tokens."""
    model, counter = cfg.build(VOCAB, 0), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused kernel of a CPU
        output(model, torch.ones(1, SEQ, dtype=torch.long)).sum().backward()
    return int(counter.get_total_flops())


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("adapter", "share"),
    [
        (AdapterConfig(rank=4), 2.1),
        (AdapterConfig(rank=4, base="nf4"), 2.1),
        (AdapterConfig(rank=4, targets=("layers.2.*", "layers.3.mlp.*")), 1.5),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_of_a_decoder_with_adapters(adapter: AdapterConfig, share: float, *, tied: bool) -> None:
    cfg = replace(DECODER, tied=tied, adapter=adapter)
    # We count the gradient of the lowest layer's input too, which nobody asks for.
    unasked = 2 * SEQ * 64 * 3 * (64 + 4)
    said, causal = training_flops_per_sequence(cfg, VOCAB, SEQ)
    assert said == pytest.approx(_counted(cfg, _logits) + unasked, rel=1e-3)
    assert causal < said
    assert said / forward_flops_per_sequence(cfg, VOCAB, SEQ)[0] == pytest.approx(share, abs=0.15)


@pytest.mark.parametrize(
    ("targets", "products"),
    [
        (("*",), 6),  # q, k, v of the first layer of each half
        (("decoder.*",), 3 + 2 * 2),  # of its first layer, and k, v of the source in both
        (("decoder.block.1.*",), 3 + 2),
    ],
)
def test_of_an_encoder_and_decoder_with_adapters(targets: tuple[str, ...], products: int) -> None:
    """`products` need no gradient of their input, which we count."""
    cfg = replace(T5, adapter=AdapterConfig(rank=4, targets=targets))
    unasked = 2 * SEQ * 64 * (64 + 4) * products
    said, _ = training_flops_per_sequence(cfg, VOCAB, SEQ)
    assert said == pytest.approx(_counted(cfg, _logits) + unasked, rel=1e-3)


def test_of_heads_on_a_frozen_trunk() -> None:
    cfg = MedusaConfig(trunk=DECODER, num_heads=3)
    counted = _counted(cfg, lambda model, tokens: model(tokens, ahead=True))
    assert training_flops_per_sequence(cfg, VOCAB, SEQ)[0] == pytest.approx(counted, rel=1e-3)


def test_without_frozen_weights_they_are_three_times_forward() -> None:
    for cfg in (DECODER, T5):
        forward = forward_flops_per_sequence(cfg, VOCAB, SEQ)
        assert training_flops_per_sequence(cfg, VOCAB, SEQ) == tuple(3 * f for f in forward)
