"""Names of formats and transforms, for configs that choose among them without torch."""

from typing import Literal

Format = Literal["nvfp4", "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "fp8_e4m3", "fp8_e5m2"]
Signs = Literal["fixed", "random", "none"]  # of a Hadamard transform
HADAMARD_SIZES = (16, 32, 64, 128)
