"""Micro-batches of one step: the weights are the same, so that each is quantised once."""

from collections import Counter
from typing import Any

import pytest
import torch

from kernels import operands
from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from tests.plain_nodes import shipped

MODEL = DecoderConfig(depth=2, width=64, num_heads=2, hidden=128)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager references: these few steps are not worth compiling for."""
    monkeypatch.setattr("models.precision.compile_kernels", lambda: None)


@pytest.mark.parametrize("name", ["nvfp4_all_layers", "mxfp4_tseng", "fp8_delayed"])
def test_micro_batches_quantise_each_weight_once_and_change_no_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Counter[int]()
    make = operands.Operands._made

    def counted(self: Any, x: Any, gemm: Any, operand: Any, dims: Any, number: int) -> Any:
        made[number] += 1
        return make(self, x, gemm, operand, dims, number)

    monkeypatch.setattr(operands.Operands, "_made", counted)
    gradients, counts = [], []
    for several in (False, True):
        precision = shipped("precision", name).build(torch.device("cpu"))
        model = MODEL.build(256, 0)
        precision.prepare(model)
        made.clear()
        precision.begin(0, 10)
        with precision.same_weights(several):
            for first in (0, 2):
                tokens = torch.arange(first, first + 2 * 32).view(2, 32) % 256
                samples = torch.arange(first, first + 2)
                with precision.autocast(NoiseKey(seed=0, step=0, samples=samples)):
                    model(tokens, tokens).total.backward()  # type: ignore[union-attr]
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        counts.append(made[1] + made[3])
        assert not any(linear.kept for linear in precision._linears)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counts[0] == 2 * counts[1] > 0
