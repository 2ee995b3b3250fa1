"""A number format with its blocks and the rule of its scales, as one value that quantises."""

from dataclasses import dataclass, fields

from jaxtyping import Float
from torch import Tensor

from kernels.double_scales import (
    EDEN_TOP,
    group_block,
    quantise_double_block,
    quantise_ms_eden,
)
from kernels.format_names import DOUBLE, EDEN, Format
from kernels.formats import E1M2, E2M1, E4M3, E5M2, FloatFormat
from kernels.quantise import (
    TENSOR,
    Block,
    E4M3Max,
    Quantised,
    quantise_fp8,
    quantise_mx,
    quantise_nvfp4,
)

_ELEMENTS = {
    "nvfp4": E2M1,
    "ufp4": E1M2,
    "mxfp4": E2M1,
    "mxfp8_e4m3": E4M3,
    "mxfp8_e5m2": E5M2,
    "fp8_e4m3": E4M3,
    "fp8_e5m2": E5M2,
}


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """A number format with its blocks and scales; calling it quantises.

    Args:
        block: (along the other dimension, along the summed one); (0, 0): one scale for the tensor.
        scale: how scales are made. nvfp4: te214, paper, or those of `kernels.double_scales`; ufp4:
            te214 or paper; mx: floor, rceil, ceil or even; fp8 in blocks: power_of_two or fp32.
        sr_headroom, e4m3_max, row_scaled: see `kernels.quantise.quantise_nvfp4`.
        four_over_six: its error, "mae" or "mse"; "" for none.
        element_headroom: of mx formats, see `kernels.quantise.quantise_mx`.
        group: elements along the summed dimension that share an outer scale (double_block) or a
            correction (ms_eden).
    """

    format: Format
    block: Block
    scale: str = "te214"
    sr_headroom: float = 1.0
    element_headroom: float = 1.0
    four_over_six: str = ""
    e4m3_max: E4M3Max = 448
    row_scaled: bool = False
    group: int = 0

    def __call__(
        self, x: Float[Tensor, "rows cols"], bits: Tensor | None = None, amax: Tensor | None = None
    ) -> Quantised:
        """Return `x` quantised by the eager reference, its columns being summed over.

        Args:
            bits: dice of stochastic rounding, None rounds to nearest.
            amax: the magnitude that the scale of the tensor stands for, None that of `x`.
        """
        fmt = self.elements
        if self.scale in EDEN:
            as_in_code = self.scale == EDEN[1]
            return quantise_ms_eden(
                x, block=self.block, group=self.group, bits=bits, amax=amax, as_in_code=as_in_code
            )
        if self.scale == DOUBLE:
            return quantise_double_block(
                x, block=self.block, group=self.group, bits=bits, sr_headroom=self.sr_headroom
            )
        if self.format in ("nvfp4", "ufp4"):
            return quantise_nvfp4(
                x,
                fmt=fmt,
                block=self.block,
                amax=amax,
                order=self.scale,  # type: ignore[arg-type]
                bits=bits,
                sr_headroom=self.sr_headroom,
                four_over_six=self.four_over_six or None,  # type: ignore[arg-type]
                e4m3_max=self.e4m3_max,
                row_scaled=self.row_scaled,
            )
        if self.format.startswith("mx"):
            return quantise_mx(
                x,
                fmt=fmt,
                block=self.block,
                scale_rounding=self.scale,
                bits=bits,
                sr_headroom=self.sr_headroom,
                element_headroom=self.element_headroom,
            )
        return quantise_fp8(
            x, fmt=fmt, block=self.block, amax=amax, powers_of_two=self.scale != "fp32"
        )

    def along(self, dim: int) -> "Quantiser":
        """Return this quantiser for an operand whose dimension `dim` is summed over."""
        block = self.block if dim == 1 else self.block[::-1]
        given = {name: getattr(self, name) for name in _FIELDS}
        return Quantiser(**given | {"block": block})

    @property
    def elements(self) -> FloatFormat:
        """The format of the elements."""
        return _ELEMENTS[self.format]

    @property
    def simple_nvfp4(self) -> bool:
        """True for the variants of NVFP4 that the Triton kernel computes."""
        options = bool(self.four_over_six) or self.row_scaled or self.scale != "te214"
        return self.format == "nvfp4" and not options and max(self.block) == 16

    @property
    def stacked(self) -> bool:
        """True where elements x scales are not exact in bf16, so that scales stay apart."""
        return self.format.startswith("fp8") and self.block != TENSOR and self.scale == "fp32"

    @property
    def folds(self) -> bool:
        """True where scales of blocks are multiplied into the elements, exactly, in bf16."""
        return self.block != TENSOR and not self.stacked

    @property
    def apart(self) -> Block | None:
        """Block of the scales that the product applies block by block, None where it has none."""
        if self.scale == DOUBLE:
            return group_block(self.block, self.group)
        return self.block if self.stacked else None

    @property
    def span(self) -> Block:
        """What the sizes of a tensor must be multiples of."""
        return group_block(self.block, self.group) if self.group else self.block

    @property
    def denominator(self) -> float:
        """Denominator of the factor in the epilogue."""
        if self.scale in EDEN:
            return EDEN_TOP
        if self.format not in ("nvfp4", "ufp4") or self.scale == DOUBLE:
            return 1.0
        return _ELEMENTS[self.format].max * self.e4m3_max


# By name: torch.compile of torch 2.11 does not know the `__dict__` of a frozen dataclass.
_FIELDS = tuple(field.name for field in fields(Quantiser))
