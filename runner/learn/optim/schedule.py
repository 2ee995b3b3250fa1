"""The learning rate as a function of the step: warm-up, then constant, cosine, linear or WSD."""

import math
from typing import Literal

from models.config import config, refuse_no_steps


@config
class ScheduleConfig:
    """The factor that multiplies the learning rate.

    Args:
        kind: course of the factor after the warm-up.
        warmup: steps of linear warm-up if >= 1, else a fraction of the budget.
        final: the factor at the last step, 0 to 1.
        cooldown: wsd only: the fraction of the budget over which the factor falls linearly to
            `final`.
    """

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: float = 0.05
    final: float = 0.1
    cooldown: float = 0.2

    def __post_init__(self) -> None:
        refuse_no_steps("warmup", self.warmup)
        for name in ("final", "cooldown"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")

    def check(self, steps: int) -> None:
        """Check that the warm-up, and with kind=wsd the cool-down after it, fit into `steps`.

        Raises:
            ValueError: they do not.
        """
        warmup = self._warmup_steps(steps)
        if warmup > steps:
            raise ValueError(
                f"warmup={self.warmup:g} steps are more than the {steps} of the run; lower it, or "
                "give a fraction of the run below 1"
            )
        cooldown = self.cooldown * steps if self.kind == "wsd" else 0
        if warmup + cooldown > steps + 1e-6:
            raise ValueError(
                f"warmup={self.warmup:g} and cooldown={self.cooldown:g} together are "
                f"{warmup + cooldown:g} steps, more than the {steps} of the run: the rate would "
                "jump; lower one of them"
            )

    def _warmup_steps(self, steps: int) -> int:
        return int(self.warmup if self.warmup >= 1 else self.warmup * steps)

    def factor(self, step: int, steps: int) -> float:
        """Return the factor for 0-based `step` of `steps`."""
        warmup = self._warmup_steps(steps)
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
