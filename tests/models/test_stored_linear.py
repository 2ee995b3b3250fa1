"""Schemes by name, and models whose linear layers are stored by them."""

import copy
from collections.abc import Callable

import pytest
import torch

from models.bdh_config import BDHConfig
from models.contract import for_inference, logits
from models.decoder_config import DecoderConfig
from models.scheme import parse_scheme
from models.stored_linear import compress, decompress, stored_layers

MODEL = DecoderConfig(depth=2, width=96, num_heads=2)
# Bits of a weight of the form, with scales, and the largest relative error of the logits.
SCHEMES = {
    "int8": (9.2, 0.02),
    "int8-dynamic": (9.2, 0.03),
    "int4-g32": (4.6, 0.3),
    "int4-g16-asym": (6.1, 0.2),
    "gptq-int4-g32": (4.6, 0.3),
    "awq-int4-g32": (5.6, 0.3),
    "hqq-int4-g32": (5.1, 0.3),
    "int3-g32": (3.6, 0.5),
    "ternary": (3.1, 1.5),
    "fp8": (9.2, 0.08),
    "fp8-dynamic": (9.2, 0.1),
    "nf4": (4.6, 0.3),
    "nf4-double": (4.3, 0.3),
    "nvfp4": (4.6, 0.3),
    "nvfp4-dynamic": (4.6, 0.4),
    "mxfp4": (4.3, 0.4),
    "mxfp4-dynamic": (4.3, 0.5),
    "mxfp8": (8.3, 0.08),
    "mxfp8-dynamic": (8.3, 0.1),
}


@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_stored_model_is_near_takes_its_bits_and_is_the_same_loaded_and_laid_out(
    name: str,
) -> None:
    scheme, tokens = parse_scheme(name), torch.arange(24).view(2, 12)
    model, other = MODEL.build(64, 0), MODEL.build(64, 1)
    before = logits(model, tokens).detach()
    calibrate: Callable[[], object] = lambda: model(tokens)  # noqa: E731
    with torch.no_grad():
        compress(model, scheme, calibrate if scheme.needs_data else None)
        after = logits(model, tokens)
    bits, error = SCHEMES[name]
    layers = stored_layers(model).values()
    assert len(layers) == 8
    stored = sum(layer.num_bytes() for layer in layers)
    assert 8 * stored / sum(layer.num_frozen for layer in layers) < bits
    assert 0 < float((after - before).norm() / before.norm()) < error
    compress(other, scheme)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, tokens), after)
    plain = logits(decompress(other), tokens)
    if not scheme.dynamic:
        torch.testing.assert_close(plain, after, rtol=1e-4, atol=1e-5)
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        laid = for_inference(low)
        for rows in (2, 1):  # a single token has a product of its own in int4
            read = logits(laid, tokens[:rows, : 1 if rows == 1 else 12])
            wanted = after[:rows, : read.shape[1]]
            assert float((read - wanted).norm() / wanted.norm()) < (0.3 if scheme.dynamic else 0.02)
        laid_out = logits(for_inference(model), tokens)
    torch.testing.assert_close(laid_out, after, rtol=1e-4, atol=1e-4)


def test_a_model_whose_layers_share_weights_is_stored_too() -> None:
    model = BDHConfig(depth=2, width=32, num_heads=2, multiplier=8).build(64, 0)
    before = logits(model, torch.arange(12)[None]).detach()
    compress(model, parse_scheme("int8"))
    after = logits(model, torch.arange(12)[None]).detach()
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int9", "none of: .*int2 to int8.*nvfp4-dynamic"),
        ("gptq-nf4", "gptq rounds integers; take gptq-int4-g32"),
        ("int4-g32-dynamic", "activations are quantised by int8, fp8, nvfp4, mxfp4, mxfp8"),
        ("qoq-g128", "needs kernels of its own on a GPU"),
        ("eagle", "there is no eagle: it is a draft model .* no format of weights"),
        ("bnb-nf4", "there is no bnb: nf4 is bitsandbytes' format to the bit"),
        ("int4-g1", "must be of at least 2"),
    ],
)
def test_a_name_that_is_no_scheme_is_refused_with_the_way_out(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_scheme(name)
