"""The learning rate as a function of the step: warm-up, then constant, cosine, linear or WSD."""

import math
from typing import Literal

from models.config import config


@config
class ScheduleConfig:
    """The factor that multiplies the learning rate.

    Args:
        warmup: steps of linear warm-up if >= 1, else a fraction of the budget.
        final: the factor at the last step.
        cooldown: wsd only: the fraction of the budget over which the factor falls linearly to
            `final`.
    """

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: float = 0.05
    final: float = 0.1
    cooldown: float = 0.2

    def factor(self, step: int, steps: int) -> float:
        """Return the factor for 0-based `step` of `steps`."""
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - 1 - warmup)
        if self.kind == "constant":
            return 1.0
        if self.kind == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        if self.kind == "wsd":
            start = 1.0 - self.cooldown * steps / max(1, steps - warmup)
            done = max(0.0, (done - start) / max(1e-9, 1.0 - start))
        return 1.0 - (1 - self.final) * done
