"""What weights are stored in, for configs that choose without torch; see `kernels.stored`."""

from dataclasses import dataclass
from typing import Literal

Elements = Literal[
    "int", "int8", "ternary", "fp8", "mxfp4", "mxfp8", "nvfp4", "nf4", "nf4_single", "trained"
]


@dataclass(frozen=True)
class Storage:
    """How a matrix is stored; "trained" is what its layer computes with, of bits of its own.

    Args:
        bits: of a code.
        group: columns of a group of integers (None: a row).
        symmetric: integers without a zero point.
    """

    elements: Elements
    bits: int
    group: int | None = None
    symmetric: bool = True
