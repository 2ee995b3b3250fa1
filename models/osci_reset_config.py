"""The config of OsciReset: when weights are watched, and which of them oscillate."""

from collections.abc import Sequence
from math import ceil, inf

from models.config import config, refuse_no_steps
from models.operand_config import OperandConfig


@config
class OsciResetConfig:
    """Sets the weights that oscillate between two quantised values to the present one.

    Windows lie `every` steps apart. One that the run ends in resets nothing.

    Args:
        start_at: step at which the first window begins; below 1, a share of the run.
        every: steps from the beginning of a window to that of the next.
        window: steps of a window.
        threshold: a weight oscillates where sum |dQ(w)| is so many times sum |dw|, or more.
    """

    start_at: float = 2 / 3
    every: int = 200
    window: int = 50
    threshold: float = 16.0

    def __post_init__(self) -> None:
        refuse_no_steps("osci_reset.start_at", self.start_at)
        if not 1 <= self.window <= self.every:
            raise ValueError(
                f"osci_reset.window={self.window} must be 1 to every={self.every}; windows of the "
                "same weights do not overlap"
            )
        if not 0 < self.threshold < inf:
            raise ValueError(f"osci_reset.threshold={self.threshold} must be above 0 and finite")

    def check(self, steps: int, weights: Sequence[tuple[OperandConfig, int]]) -> None:
        """Check that it can count in a run of `steps`.

        Args:
            weights: fprop.w and the size of fprop's Hadamard transform, of each kind of layer.

        Raises:
            ValueError: no window begins, no weight is quantised, or Q(w) is not one of w alone.
        """
        if self.start_at >= max(steps, 1):
            raise ValueError(
                f"osci_reset.start_at={self.start_at:g} is never reached in the {steps} steps of "
                "the run; lower it, or give a share of the run below 1"
            )
        if all(w.format == "compute" for w, _ in weights):
            raise ValueError("osci_reset needs a format of fprop.w; set it, or osci_reset=null")
        for w, hadamard in weights:
            of_more = hadamard or w.quantile or w.scale == "delayed"
            if w.format != "compute" and (of_more or w.rounding != "nearest"):
                raise ValueError(
                    "osci_reset needs weights of the forward pass that are rounded to nearest, "
                    f"with neither hadamard, quantile nor delayed scales; fprop.w is {w.describe()}"
                    f", hadamard={hadamard}; change it, or set osci_reset=null"
                )

    def first(self, steps: int) -> int:
        """Return the step at which the first window of a run of `steps` begins."""
        return ceil(self.start_at * steps if self.start_at < 1 else self.start_at)

    def place(self, step: int, steps: int) -> int | None:
        """Return the place of `step` in its window, from 0; None outside windows."""
        after = step - self.first(steps)
        return after % self.every if after >= 0 and after % self.every < self.window else None
