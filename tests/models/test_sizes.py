"""A model's formulas are held against the model that it builds and what torch counts in it."""

from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from models.sizes import check_formulas, check_parameters

VOCAB, SEQ, WIDTH = 20, 8, 4
PARAMETERS, FLOPS = 2 * VOCAB * WIDTH, 2 * SEQ * WIDTH * VOCAB


@dataclass(frozen=True, kw_only=True)
class TiedConfig:
    """An embedding and a head, or one weight for both; formulas that may be wrong."""

    parameters: int = PARAMETERS
    flops: int = FLOPS
    tied: bool = False
    needs_values: bool = False

    def build(self, vocab_size: int, seed: int) -> nn.Module:
        """Return the model."""
        return Tied(self, vocab_size)

    def num_parameters(self, vocab_size: int) -> int:
        """Return what was given."""
        return self.parameters

    def forward_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return what was given."""
        return self.flops, self.flops


class Tied(nn.Module):
    """See `TiedConfig`."""

    def __init__(self, cfg: TiedConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.wte, self.head = nn.Embedding(vocab_size, WIDTH), nn.Linear(WIDTH, vocab_size, False)
        if cfg.tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        if self.cfg.needs_values and tokens.max().item() >= 0:
            return self.head(self.wte(tokens))
        return self.head(self.wte(tokens))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (TiedConfig(parameters=1_014_336), r"gives 1,014,336, the model that it builds has 160"),
        (TiedConfig(tied=True), r"gives 160, the model that it builds has 80"),
        (TiedConfig(flops=FLOPS // 2), r"gives 640 for all pairs, torch's counter sees 1,280"),
        (TiedConfig(parameters=1, needs_values=True), r"gives 1, the model that it builds has 160"),
    ],
)
def test_a_wrong_formula_is_refused(cfg: TiedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_formulas(cfg, VOCAB, SEQ)


def test_right_formulas_pass_and_more_flops_than_torch_sees_are_told() -> None:
    assert check_formulas(TiedConfig(), VOCAB, SEQ) is None
    assert check_formulas(TiedConfig(tied=True, parameters=80), VOCAB, SEQ) is None
    assert check_formulas(TiedConfig(flops=1, needs_values=True), VOCAB, SEQ) is None
    odd = str(check_formulas(TiedConfig(flops=FLOPS * 3), VOCAB, SEQ))
    assert "gives 3,840, torch's counter sees 1,280" in odd
    built = TiedConfig().build(VOCAB, 0)
    check_parameters(TiedConfig(), VOCAB, built)
    with pytest.raises(ValueError, match="mend the formula"):
        check_parameters(TiedConfig(parameters=159), VOCAB, built)
