"""The config of layers that are trained rounded; see `models/rounded_linear.py`."""

from typing import Literal

from models.config import config


@config
class RoundingConfig:
    """Weights of the blocks' linear layers that are rounded in each forward pass of training.

    What is trained are weights in full; gradients pass the rounding. `espalier quantise --schemes
    as-trained` stores what such a model computes with, and adds no loss.

    Args:
        weights: ternary (BitNet b1.58, arXiv 2402.17764), integers whose step is learned (LSQ,
            1902.08153), or integers as torchao rounds them, which must be installed.
        bits: of integers.
        group: columns of a group of torchao's integers; those of the others have one step a matrix.
        activations: int8, a scale for each token; full leaves them as they are.
        normed: divide the input of each layer by its root mean square, as BitNet does.
    """

    weights: Literal["ternary", "lsq", "torchao"] = "ternary"
    bits: int = 4
    group: int = 32
    activations: Literal["full", "int8"] = "full"
    normed: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"rounding.bits={self.bits} must lie between 2 and 8")
        if self.group < 2:
            raise ValueError(f"rounding.group={self.group} must be at least 2 columns")
