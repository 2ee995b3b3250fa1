"""The precision of a run as data: which format each operand of each GEMM of each layer has.

A linear layer is three GEMMs (fprop x w, dgrad g w, wgrad g x). Each operand says its format, block,
rounding and scale; what says nothing stays in `compute`. Defaults are the published ones of the format.
"""

from typing import TYPE_CHECKING, Literal

from kernels.format_names import HADAMARD_SIZES, Format, Signs
from models.config import config, execution, neutral

if TYPE_CHECKING:
    import torch

    from models.precision import Precision

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

    format: Format | Literal["compute"] = "compute"
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
        _ = self.block_shape  # refuses what is none
        if self.scale_rule not in self._scales:
            raise ValueError(
                f"scale={self.scale} is none of {', '.join(self._scales)} for {self.format}, block={self.block}"
            )
        e2m1 = self.format in ("nvfp4", "mxfp4")
        if self.rounding == "stochastic" and not e2m1:
            raise ValueError(f"rounding=stochastic is for nvfp4 and mxfp4, not for {self.format}")
        for name in ("four_over_six", "row_scaled", "quantile"):
            if getattr(self, name) and self.format != "nvfp4":
                raise ValueError(f"{name} is for nvfp4, not for {self.format}")
        if self.row_scaled and self.block_shape[0] != 1:
            raise ValueError(f"row_scaled needs blocks of one row, not block={self.block}")
        if self.quantile is not None and not 0.0 < self.quantile <= 1.0:
            raise ValueError(f"quantile={self.quantile} must lie in (0, 1]")

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block, (0, 0) for the whole tensor; the default resolved."""
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
        return _FP8_TENSOR if self.block_shape == (0, 0) else _FP8_BLOCKS

    @property
    def scale_rule(self) -> str:
        """How scales are made, the default resolved."""
        return self.scale or self._scales[0]

    def couples(self, sequence_length: int, *, summed: bool) -> bool:
        """Return whether a scale of this operand, of activations or gradients, covers several samples.

        Args:
            summed: the GEMM sums over tokens (wgrad), so that blocks lie along them.
        """
        if self.format == "compute":
            return False
        if self.block_shape == (0, 0) or (
            self.format == "nvfp4" and (summed or not self.row_scaled)
        ):
            return True  # one scale for the tensor; a row of wgrad's holds all tokens
        return bool(sequence_length % self.block_shape[int(summed)])

    def describe(self) -> str:
        """Return format, block, scale and rounding in a few words."""
        if self.format == "compute":
            return ""
        block = (
            "tensor"
            if self.block_shape == (0, 0)
            else f"{self.block_shape[0]}x{self.block_shape[1]}"
        )
        options = [f"quantile {self.quantile}"] * (self.quantile is not None)
        options += ["4over6"] * self.four_over_six + ["row-scaled"] * self.row_scaled
        options += [f"headroom {self.sr_headroom:g}"] * (self.sr_headroom != 1.0)
        rounding = "SR" if self.rounding == "stochastic" else "RNE"
        return " ".join([self.format, block, self.scale_rule, rounding, *options])


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
        if self.hadamard and self.hadamard not in HADAMARD_SIZES:
            raise ValueError(
                f"hadamard={self.hadamard} is none of 0, {', '.join(map(str, HADAMARD_SIZES))}"
            )


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
            "fprop.x": self.fprop.x,
            "fprop.w": self.fprop.w,
            "dgrad.g": self.dgrad.g,
            "dgrad.w": self.dgrad.w,
            "wgrad.g": self.wgrad.g,
            "wgrad.x": self.wgrad.x,
        }

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a scale, or a group of the Hadamard transform, covers several samples."""
        tokens = (
            (self.fprop.x, False),
            (self.dgrad.g, False),
            (self.wgrad.g, True),
            (self.wgrad.x, True),
        )
        mixed = self.wgrad.hadamard and not self.plain and sequence_length % self.wgrad.hadamard
        return bool(mixed) or any(o.couples(sequence_length, summed=s) for o, s in tokens)

    @property
    def plain(self) -> bool:
        """True where nothing is quantised."""
        return all(operand.format == "compute" for operand in self.operands().values())


@config
class RuleConfig(LinearConfig):
    """Another choice for the layers whose name matches `match`, `layers.*.mlp.*` for example."""

    match: str


@config
class PrecisionConfig:
    """A compute dtype (`bf16` by autocast), and the low-precision GEMMs of the linear layers in blocks.

    Args:
        fprop, dgrad, wgrad: formats of every quantised layer but those of `rules`, first match first.
        layers: patterns of the linears that are quantised; keep: of those that stay in `compute`.
        keep_first, keep_last: blocks at either end that stay in `compute`: a number, or below 1 a share.
        switch_at: step, or below 1 share of the run, from which `switch` (forward, backward, both) goes
            on in `compute`.
        pad: fill widths that are no multiple of a block up with zeros instead of refusing them.
        check_finite: stop at a NaN or inf operand instead of training on.
        diagnostics_every: steps between looks at every quantised operand (None: never, at no cost).
        backend: native computes with TransformerEngine and refuses to run where it cannot; auto takes it
            where it can and emulates elsewhere, the table says why; emulated never takes it.
    """

    numerics = 2  # 1 went backward through short bf16 attention in bf16 on CPUs

    compute: Literal["fp32", "bf16"] = "fp32"
    fprop: FpropConfig = neutral(FpropConfig())
    dgrad: DgradConfig = neutral(DgradConfig())
    wgrad: WgradConfig = neutral(WgradConfig())
    rules: tuple[RuleConfig, ...] = neutral(())
    layers: tuple[str, ...] = neutral(("*",))
    keep: tuple[str, ...] = neutral(())
    keep_first: float = neutral(0.0)
    keep_last: float = neutral(0.0)
    switch_at: float | None = neutral(None)
    switch: Literal["both", "forward", "backward"] = neutral("both")
    pad: bool = neutral(False)
    check_finite: bool = execution(False)
    diagnostics_every: int | None = execution(None)
    backend: Literal["auto", "emulated", "native"] = execution("auto")

    def __post_init__(self) -> None:
        if self.quantised and self.compute != "bf16":
            raise ValueError(f"precision.compute={self.compute}: quantised GEMMs need compute=bf16")
        for name in ("keep_first", "keep_last"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                raise ValueError(f"{name}={value} must be a number of blocks or a share below 1")

    @property
    def quantised(self) -> bool:
        """True where any GEMM is."""
        return not self.default.plain or any(not rule.plain for rule in self.rules)

    @property
    def default(self) -> LinearConfig:
        """The formats of layers that no rule matches."""
        return LinearConfig(fprop=self.fprop, dgrad=self.dgrad, wgrad=self.wgrad)

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a sample's numbers depend on which others are in its forward pass."""
        return any(
            linear.couples_samples(sequence_length) for linear in (self.default, *self.rules)
        )

    def build(self, device: "torch.device", *, planning: bool = False) -> "Precision":
        """Return the recipe on `device`; `planning`: another machine will run it, this one is not asked.

        Raises:
            ValueError: the device cannot compute in the dtype or format asked for.
        """
        import torch  # noqa: PLC0415

        from models.precision import Precision  # noqa: PLC0415

        cuda = self.compute == "bf16" and device.type == "cuda"
        if cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                "precision.compute=bf16 needs an Ampere GPU or later; "
                f"this is {name}; use precision=fp32"
            )
        return Precision(self, device, planning=planning)

    def notice(self, device_type: str) -> str | None:
        """Return what a user should know of this recipe on this machine, None if there is nothing.

        On a CPU one bf16 product is timed: without AMX or AVX512-BF16 it can be many times slower.
        """
        if self.compute != "bf16" or device_type != "cpu":
            return None
        from models.precision import bf16_slowdown  # noqa: PLC0415

        times = bf16_slowdown()
        if times < 1.5:
            return None
        return (
            f"precision=bf16: on this CPU a bf16 product takes {times:.1f} times as long as fp32; "
            "expect these cells to be slower"
        )
