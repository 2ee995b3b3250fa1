"""An optimiser, torch's own, and a schedule."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    """Stochastic gradient descent."""

    lr: float = 0.1
    momentum: float = 0.0

    def build(self, model: Any) -> "Optimizer":
        """Return one optimiser, whose groups know no `base_lr`."""
        import torch

        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True, kw_only=True)
class StepDecayConfig:
    """The learning rate falls by `factor_of` after each `every` steps."""

    every: int = 10
    factor_of: float = 0.5

    def factor(self, step: int, steps: int) -> float:
        """Return what the learning rate is multiplied with."""
        return self.factor_of ** (step // self.every)
