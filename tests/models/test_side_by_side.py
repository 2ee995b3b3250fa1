"""Forward passes that are made together: each has the logits and the state that it has alone."""

from typing import Any

import pytest
import torch

from models.attention_config import AttentionConfig
from models.contract import read, read_side_by_side, reads_side_by_side, start
from models.decoder_config import DecoderConfig
from models.mamba_config import MambaConfig

SMALL: dict[str, Any] = {"depth": 2, "width": 16, "num_heads": 4}
WINDOW = {"w": AttentionConfig(window=5, sinks=1, learned_sink=True)}
LEARNED: dict[str, Any] = {"positions": "learned", "num_kv_heads": 2, "qk_norm": True}
FEW, SEVERAL = torch.tensor([[4], [5], [6]]), torch.tensor([[7, 8, 9, 1, 2]])
COUNTS = torch.tensor([1, 1, 0])  # the last of three rows is idle


def _begun(model: Any) -> tuple[Any, Any]:
    """Return states of three rows, of different lengths, and of one."""
    three, one = start(model, 3, 8), start(model, 1, 4)
    read(model, torch.arange(12).view(3, 4), three)
    read(model, torch.tensor([[1], [2], [3]]), three, counts=torch.tensor([1, 0, 1]))
    read(model, torch.tensor([[5, 6]]), one)
    return three, one


@pytest.mark.parametrize("more", [{}, LEARNED, {"pattern": "wf", "parts": WINDOW}])
@torch.no_grad()
def test_passes_made_together_are_those_made_one_after_the_other(more: dict[str, Any]) -> None:
    model = DecoderConfig(**SMALL | more).build(23, 3).double()
    assert reads_side_by_side(model)
    three, one = _begun(model)
    alone = [read(model, FEW, three, counts=COUNTS)[:2], read(model, SEVERAL, one)]
    other_three, other_one = _begun(model)
    first, second = read_side_by_side(
        model, [(FEW, other_three, COUNTS), (SEVERAL, other_one, None)]
    )
    for together, expected in zip((first[:2], second), alone, strict=True):
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)
    for state, expected in ((other_three, three), (other_one, one)):
        assert state.lengths.tolist() == expected.lengths.tolist()
        tokens = FEW[: len(state.lengths)]
        torch.testing.assert_close(
            read(model, tokens, state), read(model, tokens, expected), rtol=0, atol=1e-12
        )


def test_a_model_that_knows_no_parts_says_so() -> None:
    mixed = {"pattern": "mf", "parts": {"m": MambaConfig(state_dim=4, head_dim=8)}}
    assert not reads_side_by_side(DecoderConfig(**SMALL | mixed).build(23, 3))
    assert not reads_side_by_side(torch.nn.Linear(2, 2))
