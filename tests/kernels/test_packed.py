"""The packed layout computes what the plain one does."""

import pytest
import torch
import torch.nn.functional as F

from kernels.packed import PackedWeight, can_pack, packed_linear
from models.decoder_config import DecoderConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 1), (2, 5), (4, 8)])
@pytest.mark.parametrize("intel", [True, False])
def test_packed_products_are_plain_products(
    monkeypatch: pytest.MonkeyPatch, intel: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("kernels.packed._INTEL", intel)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*s, generator=generator).to(dtype) for s in ((*shape, 48), (80, 48), (80,))
    )
    assert can_pack(weight)
    for b in (bias, None):
        found = packed_linear(x, weight, PackedWeight(weight), b)
        assert found.dtype == dtype
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        tolerance = 48 * torch.finfo(dtype).eps * 4
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_laid_out_for_inference_says_the_same(tied: bool) -> None:
    model = DecoderConfig(depth=2, width=32, num_heads=2, tied=tied, bias=True).build(50, 0)
    tokens = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(1))
    before = model(tokens)
    torch.testing.assert_close(model.for_inference()(tokens), before, rtol=1e-5, atol=1e-5)
    state = model.start(4, 6)
    for place in range(6):
        logits = model(tokens[:, place : place + 1], state=state)
    torch.testing.assert_close(logits, before[:, -1], rtol=1e-5, atol=1e-5)
