"""Names of formats and transforms, for configs that choose among them without torch."""

from typing import Literal

Format = Literal["nvfp4", "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "fp8_e4m3", "fp8_e5m2"]
# Of a Hadamard transform: TransformerEngine's, drawn once a layer, at each step, or all +1.
Signs = Literal["fixed", "random", "step", "none"]
HADAMARD_SIZES = (16, 32, 64, 128)
