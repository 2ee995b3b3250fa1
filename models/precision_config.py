"""The config of a precision recipe: the format of each operand of each GEMM of each linear layer.

A linear layer is three GEMMs (fprop x w, dgrad g w, wgrad g x). An operand has a format, block,
rounding and scale, by default those published with the format; without a format it stays in
`compute`.
"""

from math import inf
from typing import TYPE_CHECKING, Literal

from kernels.format_names import HADAMARD_SIZES, Format, Signs
from models.config import config, execution, neutral, refuse_no_steps

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
        format: number format; `compute` does not quantise.
        block: elements that share a scale, ROWSxCOLS with COLS along the summed dimension, or
            "tensor" (FP8 only). None: 1x16 for nvfp4, 1x32 for mx formats, tensor for fp8.
        rounding: to nearest even, or stochastic (nvfp4 and mxfp4 only).
        scale: rule that makes scales. nvfp4: te214, paper (two orders of its products); mx:
            rceil, floor, ceil, even; fp8 with one scale: current, delayed; fp8 with blocks:
            power_of_two, fp32. None: the first of these.
        sr_headroom: factor on block scales; 17/16 keeps stochastic rounding from saturating.
        element_headroom: mx formats: elements are divided by it before rounding, the product is
            multiplied by it; 4/3 keeps stochastic rounding under floor scales from saturating.
        four_over_six: nvfp4: a block maps its maximum to 4 instead of 6 where that errs less.
        four_over_six_error: by the mean absolute or the mean squared error of the block.
        e4m3_max: with four_over_six: the scale of the tensor's largest block, 448 (E4M3's largest)
            or 256, at which that block too has the choice.
        row_scaled: nvfp4: a global scale per row instead of one for the tensor.
        quantile: nvfp4: make the global scale of this quantile of |x| instead of its maximum.
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

    def __post_init__(self) -> None:
        if self.format == "compute":
            return
        _ = self.block_shape  # raises if `block` cannot be read
        if self.scale_rule not in self._scales:
            raise ValueError(
                f"scale={self.scale} is none of {', '.join(self._scales)} "
                f"for {self.format}, block={self.block}"
            )
        e2m1 = self.format in ("nvfp4", "mxfp4")
        if self.rounding == "stochastic" and not e2m1:
            raise ValueError(f"rounding=stochastic is for nvfp4 and mxfp4, not for {self.format}")
        for name in ("four_over_six", "row_scaled", "quantile"):
            if getattr(self, name) and self.format != "nvfp4":
                raise ValueError(f"{name} is for nvfp4, not for {self.format}")
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
        if self.block_shape == (0, 0) or (
            self.format == "nvfp4" and (summed or not self.row_scaled)
        ):
            return True  # one scale for the tensor; in wgrad a row holds all tokens
        return bool(sequence_length % self.block_shape[int(summed)])

    def check(self) -> None:
        """Check that every option counts: what is set is what is computed.

        Raises:
            ValueError: an option would be passed over in silence.
        """
        if self.format == "compute":
            return
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
        options += [f"headroom {self.sr_headroom:g}"] * (self.sr_headroom != 1.0)
        options += [f"elements / {self.element_headroom:g}"] * (self.element_headroom != 1.0)
        rounding = "SR" if self.rounding == "stochastic" else "RNE"
        return " ".join([self.format, block, self.scale_rule, rounding, *options])


@config
class GemmConfig:
    """The Hadamard transform of both operands of a GEMM along the summed dimension.

    Args:
        hadamard: size of the transformed groups, 0 for no transform.
        signs: fixed (TransformerEngine's), random (one draw per layer), step (another draw for each
            step, layer and GEMM; fixed where there are no dice, in evaluation) or none.
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
        """Return the operands by name, in the order of `kernels.quantised_linear.OPERANDS`."""
        return {
            "fprop.x": self.fprop.x,
            "fprop.w": self.fprop.w,
            "dgrad.g": self.dgrad.g,
            "dgrad.w": self.dgrad.w,
            "wgrad.g": self.wgrad.g,
            "wgrad.x": self.wgrad.x,
        }

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a scale or a group of the Hadamard transform spans several samples."""
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
        """Whether no operand is quantised."""
        return all(operand.format == "compute" for operand in self.operands().values())


@config
class RuleConfig(LinearConfig):
    """The formats of layers whose name matches `match`, `layers.*.mlp.*` for example."""

    match: str


@config
class PrecisionConfig:
    """A compute dtype, and the low-precision GEMMs of the linear layers inside the blocks.

    Args:
        compute: dtype of all that is not quantised; bf16 is by autocast.
        fprop, dgrad, wgrad: formats of the quantised layers that no rule matches.
        rules: formats of layers by name; the first match decides.
        layers: patterns of the linear layers that are quantised.
        keep: patterns of the linear layers that stay in `compute`.
        keep_first, keep_last: blocks at either end that stay in `compute`: a number, or below 1 a
            share.
        switch_at: step from which `switch` is computed in `compute`; below 1, a share of the run.
        switch: the directions that are switched.
        pad: whether widths that are not multiples of a block are filled up with zeros (None, true;
            the table states the cost) or refused (false).
        check_finite: stop at a NaN or inf operand instead of training on.
        diagnostics_every: steps between statistics of every quantised operand (None: never).
        backend: `native` is TransformerEngine, and an error where it cannot be used; `emulated` is
            ours; `auto` is TransformerEngine where it can be used, and the table says why not.
    """

    # Revision 1 had the backward pass of short attention in bf16 on CPUs; until 3 delayed scaling
    # made scales of one step less.
    numerics = 3

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
    pad: bool | None = neutral(None, False)
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
        if self.switch_at is not None:
            refuse_no_steps("switch_at", self.switch_at)

    def numerics_with(self, model: object) -> int:
        """Return the numerics revision: without delayed scaling nothing has changed since 2."""
        operands = (o for part in (self.default, *self.rules) for o in part.operands().values())
        return self.numerics if any(operand.scale == "delayed" for operand in operands) else 2

    def check(self, steps: int) -> None:
        """Check that the switch comes within `steps`, and that every option of an operand counts.

        Raises:
            ValueError: the switch would never come, or an option would be passed over.
        """
        for part in (self.default, *self.rules):
            for name, operand in part.operands().items():
                try:
                    operand.check()
                except ValueError as error:
                    where = f"rules {part.match!r}, " if isinstance(part, RuleConfig) else ""
                    raise ValueError(f"{where}{name}: {error}") from None
        if self.switch_at is not None and self.switch_at >= max(steps, 1):
            raise ValueError(
                f"switch_at={self.switch_at:g} is never reached in the {steps} steps of the run; "
                "lower it, or give a share of the run below 1"
            )

    @property
    def quantised(self) -> bool:
        """Whether any GEMM is quantised."""
        return not self.default.plain or any(not rule.plain for rule in self.rules)

    @property
    def default(self) -> LinearConfig:
        """The formats of layers that no rule matches."""
        return LinearConfig(fprop=self.fprop, dgrad=self.dgrad, wgrad=self.wgrad)

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a sample's numbers depend on the others of its forward pass."""
        return any(
            linear.couples_samples(sequence_length) for linear in (self.default, *self.rules)
        )

    def build(self, device: "torch.device", *, planning: bool = False) -> "Precision":
        """Return the recipe on `device`.

        Args:
            planning: the run will be on another machine, so do not test what this one can do.

        Raises:
            ValueError: the device does not support `compute`.
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
        """Return a warning if bf16 is slow on this machine's CPU, else None.

        A bf16 product is timed: without AMX or AVX512-BF16 it can be many times slower than fp32.
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
