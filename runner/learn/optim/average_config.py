"""The config of the weight average."""

from typing import TYPE_CHECKING, Literal

from models.config import config

if TYPE_CHECKING:
    from torch import nn

    from runner.learn.optim.average import WeightAverage


@config
class AverageConfig:
    """An average of the weights; its validation loss is logged as `val_loss_average`.

    Args:
        kind: none, ema or last. ema: w <- d w + (1 - d) new after every step t, where
            d = min(decay, (1 + t) / (10 + t)) forgets the first steps. last: the mean of the
            weights at the last `count` multiples of `every` steps (latest weight averaging, arXiv
            2209.14981).
        decay: of ema.
        every, count: of last.
    """

    kind: Literal["none", "ema", "last"] = "none"
    decay: float = 0.999
    every: int = 10
    count: int = 5

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay={self.decay} must lie in (0, 1)")
        if self.every < 1 or self.count < 1:
            raise ValueError(f"every={self.every} and count={self.count} must be at least 1")

    def check(self, steps: int) -> None:
        """Check that kind=last finds all its weights within `steps`.

        Raises:
            ValueError: it would average fewer.
        """
        if self.kind == "last" and self.every * self.count > steps:
            raise ValueError(
                f"every={self.every} and count={self.count}: the last {self.count} multiples of "
                f"{self.every} do not fit into the {steps} steps of the run; lower one of them"
            )

    def build(self, model: "nn.Module") -> "WeightAverage | None":
        """Return the average of `model`, None for kind=none."""
        from runner.learn.optim.average import WeightAverage  # noqa: PLC0415

        return None if self.kind == "none" else WeightAverage(self, model)
