"""What rounds the operands of a linear layer's three GEMMs, see `kernels.quantised_linear`."""

from dataclasses import dataclass, field

from kernels.format_names import Signs
from kernels.quantiser import Quantiser


@dataclass(frozen=True, kw_only=True)
class OperandRecipe:
    """The rounding of one operand; in a `GemmRecipe` None leaves an operand in bf16.

    Args:
        stochastic: round by dice where there are any (in training).
        quantile: make the scale of the tensor from this quantile of |x| instead of the maximum.
        delayed: make the scale of the tensor from earlier steps, see `quantised_linear.Delayed`.
        centred: of x: quantise what is left after the mean over tokens, and add the product of the
            mean unquantised.
    """

    quantiser: Quantiser
    stochastic: bool = False
    quantile: float | None = None
    delayed: bool = False
    centred: bool = False


@dataclass(frozen=True, kw_only=True)
class GemmRecipe:
    """Both operands of a GEMM.

    Args:
        hadamard: size of the transform of both along the summed dimension, 0: none.
        dequantised: of the backward pass: make the right operand of what fprop has made of it,
            dequantised to bf16, and not of the tensor itself.
    """

    left: OperandRecipe | None = None
    right: OperandRecipe | None = None
    hadamard: int = 0
    signs: Signs = "fixed"
    dequantised: bool = False

    @property
    def plain(self) -> bool:
        """True where this is a bf16 GEMM of its own operands."""
        return self.left is None and self.right is None and not self.dequantised


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """The three GEMMs of a linear layer; operands (left, right) are (x, w), (g, w) and (g, x)."""

    fprop: GemmRecipe = field(default_factory=GemmRecipe)
    dgrad: GemmRecipe = field(default_factory=GemmRecipe)
    wgrad: GemmRecipe = field(default_factory=GemmRecipe)
