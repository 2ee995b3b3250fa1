"""The precision of a run as data: which format each operand of each GEMM of each layer has.

A linear layer is three GEMMs (fprop x w, dgrad g w, wgrad g x). Each operand says its format, block,
rounding and scale; what says nothing stays in `compute`. Defaults are the published ones of the format.
"""

from typing import Literal

from kernels.emulate import Quantiser
from kernels.hadamard import SIZES, Signs
from kernels.quantised_linear import GemmRecipe, LinearRecipe, OperandRecipe
from models.config import config

Format = Literal[
    "compute", "nvfp4", "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "fp8_e4m3", "fp8_e5m2"
]  # fmt: skip
_NVFP4 = ("te214", "paper")
_MX = ("rceil", "floor", "ceil", "even")
_FP8_BLOCKS = ("power_of_two", "fp32")
_FP8_TENSOR = ("current", "delayed")


@config
class OperandConfig:
    """One operand of a GEMM.

    Args:
        format: `compute` leaves it as it is.
        block: "1x16" is 1 by 16 along the summed dimension, "tensor" one scale for all (FP8 only). None:
            1x16 for nvfp4, 1x32 for mx, tensor for fp8.
        rounding: stochastic is for E2M1 elements (nvfp4, mxfp4).
        scale: nvfp4: te214, paper (the order of its products); mx: rceil, floor, ceil, even; fp8 with
            one scale: current, delayed; with blocks: power_of_two, fp32. None: the first of these.
        sr_headroom: factor on block scales; 17/16 keeps stochastic rounding from saturating.
        four_over_six, row_scaled: of nvfp4.
        quantile: nvfp4's global scale is made of this quantile of |x| instead of its maximum.
    """

    format: Format = "compute"
    block: str | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    scale: str | None = None
    sr_headroom: float = 1.0
    four_over_six: bool = False
    row_scaled: bool = False
    quantile: float | None = None

    def __post_init__(self) -> None:
        if self.format == "compute":
            return
        _ = self._block  # refuses what is none
        if self._scale not in self._scales:
            raise ValueError(f"scale={self.scale} is none of {', '.join(self._scales)} for {self.format}, block={self.block}")  # fmt: skip
        e2m1 = self.format in ("nvfp4", "mxfp4")
        if self.rounding == "stochastic" and not e2m1:
            raise ValueError(f"rounding=stochastic is for nvfp4 and mxfp4, not for {self.format}")
        for name in ("four_over_six", "row_scaled", "quantile"):
            if getattr(self, name) and self.format != "nvfp4":
                raise ValueError(f"{name} is for nvfp4, not for {self.format}")
        if self.row_scaled and self._block[0] != 1:
            raise ValueError(f"row_scaled needs blocks of one row, not block={self.block}")
        if self.quantile is not None and not 0.0 < self.quantile <= 1.0:
            raise ValueError(f"quantile={self.quantile} must lie in (0, 1]")

    @property
    def _block(self) -> tuple[int, int]:
        default = {"n": "1x16", "m": "1x32", "f": "tensor"}[self.format[0]]
        text = self.block or default
        if text == "tensor" and self.format.startswith("fp8"):
            return (0, 0)
        rows, _, cols = text.partition("x")
        if not (rows.isdigit() and cols.isdigit() and int(rows) and int(cols)):
            also = " or tensor" if self.format.startswith("fp8") else ""
            raise ValueError(f"block={text} must be ROWSxCOLS{also}, {default} for example")
        return int(rows), int(cols)

    @property
    def _scales(self) -> tuple[str, ...]:
        if self.format == "nvfp4":
            return _NVFP4
        if self.format.startswith("mx"):
            return _MX
        return _FP8_TENSOR if self._block == (0, 0) else _FP8_BLOCKS

    @property
    def _scale(self) -> str:
        return self.scale or self._scales[0]

    def couples(self, sequence_length: int, *, summed: bool) -> bool:
        """Return whether a scale of this operand, of activations or gradients, covers several samples.

        Args:
            summed: the GEMM sums over tokens (wgrad), so that blocks lie along them.
        """
        if self.format == "compute":
            return False
        if self._block == (0, 0) or (self.format == "nvfp4" and (summed or not self.row_scaled)):
            return True  # one scale for the tensor; a row of wgrad's holds all tokens
        return bool(sequence_length % self._block[int(summed)])

    def recipe(self) -> OperandRecipe | None:
        """Return what `kernels` takes, None for `compute`."""
        if self.format == "compute":
            return None
        quantiser = Quantiser(
            format=self.format, block=self._block, scale=self._scale, sr_headroom=self.sr_headroom,
            four_over_six=self.four_over_six, row_scaled=self.row_scaled,
        )  # fmt: skip
        return OperandRecipe(
            quantiser=quantiser, stochastic=self.rounding == "stochastic",
            quantile=self.quantile, delayed=self._scale == "delayed",
        )  # fmt: skip

    def describe(self) -> str:
        """Return format, block, scale and rounding in a few words."""
        if self.format == "compute":
            return ""
        block = "tensor" if self._block == (0, 0) else f"{self._block[0]}x{self._block[1]}"
        options = [f"quantile {self.quantile}"] * (self.quantile is not None)
        options += ["4over6"] * self.four_over_six + ["row-scaled"] * self.row_scaled
        options += [f"headroom {self.sr_headroom:g}"] * (self.sr_headroom != 1.0)
        rounding = "SR" if self.rounding == "stochastic" else "RNE"
        return " ".join([self.format, block, self._scale, rounding, *options])


@config
class GemmConfig:
    """A GEMM's Hadamard transform: of both operands along the summed dimension, quantised or not.

    Args:
        hadamard: size of its groups, 0 none; signs: fixed (TransformerEngine's), random (one draw for
            each layer) or none.
    """

    hadamard: int = 0
    signs: Signs = "fixed"

    def __post_init__(self) -> None:
        if self.hadamard and self.hadamard not in SIZES:
            raise ValueError(f"hadamard={self.hadamard} is none of 0, {', '.join(map(str, SIZES))}")

    def gemm(self, left: OperandConfig, right: OperandConfig) -> GemmRecipe:
        """Return what `kernels` takes."""
        return GemmRecipe(left=left.recipe(), right=right.recipe(), hadamard=self.hadamard, signs=self.signs)  # fmt: skip


@config
class FpropConfig(GemmConfig):
    """y = x w."""

    x: OperandConfig = OperandConfig()
    w: OperandConfig = OperandConfig()


@config
class DgradConfig(GemmConfig):
    """dx = g w."""

    g: OperandConfig = OperandConfig()
    w: OperandConfig = OperandConfig()


@config
class WgradConfig(GemmConfig):
    """dw = g x."""

    g: OperandConfig = OperandConfig()
    x: OperandConfig = OperandConfig()


@config
class LinearConfig:
    """The three GEMMs of a linear layer."""

    fprop: FpropConfig = FpropConfig()
    dgrad: DgradConfig = DgradConfig()
    wgrad: WgradConfig = WgradConfig()

    def operands(self) -> dict[str, OperandConfig]:
        """Return each operand by its name, in the order of `kernels.quantised_linear.OPERANDS`."""
        return {
            "fprop.x": self.fprop.x, "fprop.w": self.fprop.w, "dgrad.g": self.dgrad.g,
            "dgrad.w": self.dgrad.w, "wgrad.g": self.wgrad.g, "wgrad.x": self.wgrad.x,
        }  # fmt: skip

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a scale, or a group of the Hadamard transform, covers several samples."""
        tokens = ((self.fprop.x, False), (self.dgrad.g, False), (self.wgrad.g, True), (self.wgrad.x, True))  # fmt: skip
        mixed = self.wgrad.hadamard and not self.plain and sequence_length % self.wgrad.hadamard
        return bool(mixed) or any(o.couples(sequence_length, summed=s) for o, s in tokens)

    def recipe(self, *, forward: bool = True, backward: bool = True) -> LinearRecipe:
        """Return what `kernels` takes; a part that is switched off is in `compute`."""
        fprop = self.fprop.gemm(self.fprop.x, self.fprop.w) if forward else GemmRecipe()
        dgrad = self.dgrad.gemm(self.dgrad.g, self.dgrad.w) if backward else GemmRecipe()
        wgrad = self.wgrad.gemm(self.wgrad.g, self.wgrad.x) if backward else GemmRecipe()
        return LinearRecipe(fprop=fprop, dgrad=dgrad, wgrad=wgrad)

    @property
    def plain(self) -> bool:
        """True where nothing is quantised."""
        return all(operand.format == "compute" for operand in self.operands().values())


@config
class RuleConfig(LinearConfig):
    """Another choice for the layers whose name matches `match`, `layers.*.mlp.*` for example."""

    match: str
