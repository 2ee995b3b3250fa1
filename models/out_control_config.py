"""The config of OutControl: when channels are measured, and how many of them are outliers."""

from collections.abc import Sequence
from math import ceil

from models.config import config, refuse_no_steps
from models.operand_config import OperandConfig

_MULTIPLE = 128  # channels, a group of FP8


@config
class OutControlConfig:
    """Takes the input channels with the largest norms in FP8, from the end of a window on.

    A layer's channels are measured where its forward pass quantises x and w to four bits. A window
    that the run ends in, or that would begin after the run, changes nothing.

    Args:
        start_at: step at which the window begins; below 1, a share of the run.
        window: steps over which the L2 norm of each channel is summed.
        share: of the channels that are outliers; their number is rounded up to a multiple of 128.
    """

    start_at: float = 500.0
    window: int = 50
    share: float = 0.1

    def __post_init__(self) -> None:
        refuse_no_steps("out_control.start_at", self.start_at)
        if self.window < 1:
            raise ValueError(f"out_control.window={self.window} must be 1 step or more")
        if not 0 < self.share < 1:
            raise ValueError(f"out_control.share={self.share} must lie between 0 and 1")

    def check(self, inputs: Sequence[tuple[OperandConfig, OperandConfig, int]]) -> None:
        """Check that it can count.

        Args:
            inputs: fprop.x, fprop.w and the size of fprop's Hadamard transform, of each kind of
                layer.

        Raises:
            ValueError: no forward pass has four bits, or one mixes or centres its channels.
        """
        taken = [(x, hadamard) for x, w, hadamard in inputs if self.takes(x, w)]
        if not taken:
            raise ValueError(
                "out_control needs formats of four bits for fprop.x and fprop.w; set them, or "
                "out_control=null"
            )
        for x, hadamard in taken:
            if hadamard or x.centred:
                raise ValueError(
                    "out_control needs the channels as they are, but fprop has "
                    f"hadamard={hadamard}, centred={x.centred}; leave it out, or set "
                    "out_control=null"
                )

    @staticmethod
    def takes(x: OperandConfig, w: OperandConfig) -> bool:
        """Return whether a layer with these operands of fprop has outliers."""
        return x.format.endswith("fp4") and w.format.endswith("fp4")

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a group of 128 tokens, which FP8 has in wgrad, spans samples."""
        return bool(sequence_length % _MULTIPLE)

    def place(self, step: int, steps: int) -> int | None:
        """Return the place of `step` in the window, from 0; None outside."""
        start = ceil(self.start_at * steps if self.start_at < 1 else self.start_at)
        return step - start if start <= step < start + self.window else None

    def number(self, channels: int) -> int:
        """Return how many of a layer's `channels` are outliers."""
        return min(channels, ceil(self.share * channels / _MULTIPLE) * _MULTIPLE)
