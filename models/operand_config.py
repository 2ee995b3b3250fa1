"""The config of one operand of a GEMM: its number format, blocks, rounding and scales."""

from math import inf
from typing import Literal

from kernels.format_names import DOUBLE, EDEN, Format
from models.config import config, neutral

_NVFP4 = ("te214", "paper", *EDEN, DOUBLE)
_UFP4 = ("te214", "paper")
_MX = ("rceil", "floor", "ceil", "even")
_FP8_BLOCKS = ("power_of_two", "fp32")
_FP8_TENSOR = ("current", "delayed")
GROUPED = (*EDEN, DOUBLE)
DOUBLE_GROUP = 128
CENTRED = ("fprop.x", "wgrad.x")


@config
class OperandConfig:
    """One operand of a GEMM.

    Args:
        format: number format; `compute` does not quantise.
        block: elements that share a scale, ROWSxCOLS with COLS along the summed dimension, or
            "tensor" (FP8 only). None: 1x16 for nvfp4 and ufp4, 1x32 for mx formats, tensor for
            fp8.
        rounding: to nearest even, or stochastic (nvfp4, ufp4 and mxfp4 only).
        scale: rule that makes scales. nvfp4 and ufp4: te214, paper (two orders of its products);
            nvfp4 also ms_eden, ms_eden_code (Quartet II; rounding is then that of scales) and
            double_block (TetraJet-v2: an outer scale for each 128); mx: rceil, floor, ceil, even;
            fp8 with one scale: current, delayed; fp8 with blocks: power_of_two, fp32. None: the
            first of these.
        sr_headroom: factor on block scales; 17/16 keeps stochastic rounding from saturating.
        element_headroom: mx formats: elements are divided by it before rounding, the product is
            multiplied by it; 4/3 keeps stochastic rounding under floor scales from saturating.
        four_over_six: nvfp4: a block maps its maximum to 4 instead of 6 where that errs less.
        four_over_six_error: by the mean absolute or the mean squared error of the block.
        e4m3_max: with four_over_six: the scale of the tensor's largest block, 448 (E4M3's largest)
            or 256, at which that block too has the choice.
        row_scaled: nvfp4: a global scale per row instead of one for the tensor.
        quantile: nvfp4: make the global scale of this quantile of |x| instead of its maximum.
        centred: of fprop.x and wgrad.x: quantise what the mean over tokens leaves, and add the
            product of the mean unquantised (Averis).
    """

    format: Format | Literal["compute"] = "compute"
    block: str | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    scale: str | None = None
    sr_headroom: float = 1.0
    four_over_six: bool = False
    row_scaled: bool = False
    quantile: float | None = None
    element_headroom: float = neutral(1.0)
    four_over_six_error: Literal["mae", "mse"] = neutral("mae")
    e4m3_max: Literal[448, 256] = neutral(448)
    centred: bool = neutral(False)

    def __post_init__(self) -> None:
        if self.format == "compute":
            return
        _ = self.block_shape  # raises if `block` cannot be read
        if self.scale_rule not in self._scales:
            raise ValueError(
                f"scale={self.scale} is none of {', '.join(self._scales)} "
                f"for {self.format}, block={self.block}"
            )
        if self.rounding == "stochastic" and not self.format.endswith("fp4"):
            raise ValueError(
                f"rounding=stochastic is for nvfp4, ufp4 and mxfp4, not for {self.format}"
            )
        for name in ("four_over_six", "row_scaled", "quantile"):
            if getattr(self, name) and self.format != "nvfp4":
                raise ValueError(f"{name} is for nvfp4, not for {self.format}")
        if self.scale in GROUPED and self.block_shape != (1, 16):
            raise ValueError(f"scale={self.scale} needs blocks of 1x16, not block={self.block}")
        if self.element_headroom != 1.0 and not self.format.startswith("mx"):
            raise ValueError(f"element_headroom is for mx formats, not for {self.format}")
        for name in ("four_over_six_error", "e4m3_max"):
            if getattr(self, name) not in ("mae", 448) and not self.four_over_six:
                raise ValueError(f"{name}={getattr(self, name)} needs four_over_six=true")
        if not 1.0 <= self.element_headroom < inf:
            raise ValueError(f"element_headroom={self.element_headroom} must be 1 or more")
        if self.row_scaled and self.block_shape[0] != 1:
            raise ValueError(f"row_scaled needs blocks of one row, not block={self.block}")
        if self.quantile is not None and not 0.0 < self.quantile <= 1.0:
            raise ValueError(f"quantile={self.quantile} must lie in (0, 1]")

    @property
    def block_shape(self) -> tuple[int, int]:
        """(rows, columns) of a block, (0, 0) for the whole tensor; the default resolved."""
        default = {"n": "1x16", "u": "1x16", "m": "1x32", "f": "tensor"}[self.format[0]]
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
        if self.format in ("nvfp4", "ufp4"):
            return _NVFP4 if self.format == "nvfp4" else _UFP4
        if self.format.startswith("mx"):
            return _MX
        return _FP8_TENSOR if self.block_shape == (0, 0) else _FP8_BLOCKS

    @property
    def scale_rule(self) -> str:
        """The rule that makes scales, the default resolved."""
        return self.scale or self._scales[0]

    def couples(self, sequence_length: int, *, summed: bool) -> bool:
        """Return whether a scale of this operand, activations or gradients, spans samples.

        Args:
            sequence_length: tokens of a sample.
            summed: the GEMM sums over tokens (wgrad), so that blocks lie along them.
        """
        if self.format == "compute":
            return False
        if self.scale == DOUBLE:  # its groups lie along the summed dimension
            return self.centred or (summed and bool(sequence_length % DOUBLE_GROUP))
        of_tensor = self.block_shape == (0, 0) or self.format in ("nvfp4", "ufp4")
        if of_tensor and (summed or not self.row_scaled):  # in wgrad a row holds all tokens
            return True
        return self.centred or bool(sequence_length % self.block_shape[int(summed)])

    def check(self, *, hadamard: int = 0, sums_tokens: bool = False) -> None:
        """Check that every option counts: what is set is what is computed.

        Args:
            hadamard: size of the transform of this operand.
            sums_tokens: this operand can be centred.

        Raises:
            ValueError: an option would be passed over in silence.
        """
        if self.centred and not (sums_tokens and self.format != "compute"):
            raise ValueError("centred is for fprop.x and wgrad.x with a format; leave it out")
        if self.format == "compute":
            return
        if self.scale in EDEN and not hadamard:
            raise ValueError(
                f"scale={self.scale} makes up for the rounding of a rotated tensor; set hadamard "
                "of its GEMM, 128 for example"
            )
        if self.scale in GROUPED:
            fixed = ["four_over_six", "row_scaled"]
            fixed += ["sr_headroom"] if self.scale in EDEN else ["quantile"]
            for name in fixed:
                if getattr(self, name) not in (False, None, 1.0):
                    raise ValueError(f"{name} does not count with scale={self.scale}; leave it out")
        if self.four_over_six and self.rounding == "stochastic":
            raise ValueError(
                "four_over_six rounds to nearest both times; leave it or rounding=stochastic out"
            )
        if self.sr_headroom != 1.0 and (self.four_over_six or self.format.startswith("fp8")):
            raise ValueError(
                f"sr_headroom={self.sr_headroom:g} is for nvfp4 without four_over_six and for mx "
                "formats; leave it out"
            )
        if self.row_scaled and self.quantile is not None:
            raise ValueError("quantile is that of the tensor; leave it or row_scaled out")

    def describe(self) -> str:
        """Return format, block, scale and rounding in a few words, "" if not quantised."""
        if self.format == "compute":
            return ""
        rows, cols = self.block_shape
        block = f"{rows}x{cols}" if rows else "tensor"
        options = [f"quantile {self.quantile}"] * (self.quantile is not None)
        options += [f"4over6 {self.four_over_six_error} {self.e4m3_max}"] * self.four_over_six
        options += ["row-scaled"] * self.row_scaled
        options += ["centred"] * self.centred
        options += [f"headroom {self.sr_headroom:g}"] * (self.sr_headroom != 1.0)
        options += [f"elements / {self.element_headroom:g}"] * (self.element_headroom != 1.0)
        rounding = "SR" if self.rounding == "stochastic" else "RNE"
        return " ".join([self.format, block, self.scale_rule, rounding, *options])
