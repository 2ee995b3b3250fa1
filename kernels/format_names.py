"""Names of formats and transforms, for configs that choose among them without torch."""

from typing import Literal

Format = Literal["nvfp4", "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "fp8_e4m3", "fp8_e5m2", "ufp4"]
# Of a Hadamard transform: TransformerEngine's, drawn once a layer, at each step for each GEMM or
# once for both GEMMs of the backward pass, or all +1.
Signs = Literal["fixed", "random", "step", "backward", "none"]
# Rules of nvfp4 that make the scales of a group of blocks, see `kernels.double_scales`.
EDEN = ("ms_eden", "ms_eden_code")
DOUBLE = "double_block"
HADAMARD_SIZES = (16, 32, 64, 128)
