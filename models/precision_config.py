"""The config of a precision recipe: the format of each operand of each GEMM of each linear layer.

A linear layer is three GEMMs (fprop x w, dgrad g w, wgrad g x). An operand has a format, block,
rounding and scale, by default those published with the format; without a format it stays in
`compute`.
"""

from typing import TYPE_CHECKING, Literal

from kernels.format_names import HADAMARD_SIZES, Signs
from models.config import config, execution, neutral, refuse_no_steps
from models.operand_config import CENTRED, OperandConfig
from models.osci_reset_config import OsciResetConfig
from models.out_control_config import OutControlConfig

if TYPE_CHECKING:
    import torch

    from models.precision import Precision


@config
class GemmConfig:
    """The Hadamard transform of both operands of a GEMM along the summed dimension.

    Args:
        hadamard: size of the transformed groups, 0 for no transform.
        signs: fixed (TransformerEngine's), random (one draw per layer), step (another draw for each
            step, layer and GEMM; fixed where there are no dice, in evaluation), backward (the
            same, but one draw for dgrad and wgrad) or none.
    """

    hadamard: int = 0
    signs: Signs = "fixed"

    def __post_init__(self) -> None:
        if self.hadamard and self.hadamard not in HADAMARD_SIZES:
            raise ValueError(
                f"hadamard={self.hadamard} is none of 0, {', '.join(map(str, HADAMARD_SIZES))}"
            )


@config
class BackwardConfig(GemmConfig):
    """A GEMM of the backward pass.

    Args:
        saved: what the forward pass keeps for it, w for dgrad and x for wgrad: the original, or
            what fprop has quantised, dequantised to bf16 (and quantised again if it has a format).
    """

    saved: Literal["original", "quantised"] = neutral("original")


@config
class FpropConfig(GemmConfig):
    """y = x w.

    Args:
        x: format of the activations.
        w: format of the weights.
    """

    x: OperandConfig = OperandConfig()
    w: OperandConfig = OperandConfig()


@config
class DgradConfig(BackwardConfig):
    """dx = g w.

    Args:
        g: format of the gradients of the output.
        w: format of the weights.
    """

    g: OperandConfig = OperandConfig()
    w: OperandConfig = OperandConfig()


@config
class WgradConfig(BackwardConfig):
    """dw = g x.

    Args:
        g: format of the gradients of the output.
        x: format of the activations.
    """

    g: OperandConfig = OperandConfig()
    x: OperandConfig = OperandConfig()


@config
class LinearConfig:
    """The three GEMMs of a linear layer.

    Args:
        fprop: formats of the forward product.
        dgrad: formats of the product that gives the gradient of the input.
        wgrad: formats of the product that gives the gradient of the weights.
    """

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

    def check(self) -> None:
        """Check that every option counts: what is set is what is computed.

        Raises:
            ValueError: an option would be passed over in silence; names the operand or GEMM.
        """
        for name, operand in self.operands().items():
            gemm = name.partition(".")[0]
            try:
                operand.check(hadamard=getattr(self, gemm).hadamard, sums_tokens=name in CENTRED)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for gemm, name in (("dgrad", "fprop.w"), ("wgrad", "fprop.x")):
            forward = self.operands()[name]
            if getattr(self, gemm).saved == "original":
                continue
            if forward.format == "compute":
                raise ValueError(f"{gemm}: saved=quantised needs a format of {name}; leave it out")
            if self.fprop.hadamard or forward.centred:
                what = "fprop.hadamard" if self.fprop.hadamard else f"{name}.centred"
                raise ValueError(
                    f"{gemm}: saved=quantised would keep a tensor that {what} has changed; leave "
                    "one of them out"
                )

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
    """The formats of layers whose name matches `match`, `layers.*.mlp.*` for example.

    Args:
        match: pattern of the names of layers.
        optional: a model that has no such layer is not refused.
    """

    match: str
    optional: bool = neutral(False)


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
        osci_reset: set weights that oscillate to their quantised values (None: never).
        out_control: take the input channels with the largest norms in FP8 (None: never).
        pad: whether widths that are not multiples of a block are filled up with zeros (None, true;
            the table states the cost) or refused (false).
        check_finite: stop at a NaN or inf operand instead of training on.
        diagnostics_every: steps between statistics of every quantised operand (None: never).
        backend: `native` is TransformerEngine, and an error where it cannot be used; `emulated` is
            ours; `auto` is TransformerEngine where it can be used, else `torch._scaled_mm` for FP8
            with scales of tensors, NVFP4, MXFP4 and MXFP8, else ours, and the table says why.
    """

    # Revision 1 had the backward pass of short attention in bf16 on CPUs; until 3 delayed scaling
    # made scales of one step less, and Hadamard transforms summed in the order of a matrix product.
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
    osci_reset: OsciResetConfig | None = neutral(None)
    out_control: OutControlConfig | None = neutral(None)
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
        """Return the numerics revision: 2 without delayed scaling and Hadamard transforms."""
        parts = (self.default, *self.rules)
        operands = (operand for part in parts for operand in part.operands().values())
        delayed = any(operand.scale == "delayed" for operand in operands)
        turned = any(g.hadamard for part in parts for g in (part.fprop, part.dgrad, part.wgrad))
        return self.numerics if delayed or turned else 2

    def check(self, steps: int) -> None:
        """Check that the switch comes within `steps`, and that every option of an operand counts.

        Raises:
            ValueError: the switch would never come, or an option would be passed over.
        """
        for part in (self.default, *self.rules):
            try:
                part.check()
            except ValueError as error:
                where = f"rules {part.match!r}, " if isinstance(part, RuleConfig) else ""
                raise ValueError(f"{where}{error}") from None
        if self.switch_at is not None and self.switch_at >= max(steps, 1):
            raise ValueError(
                f"switch_at={self.switch_at:g} is never reached in the {steps} steps of the run; "
                "lower it, or give a share of the run below 1"
            )
        fprops = [part.fprop for part in (self.default, *self.rules)]
        if self.out_control is not None:
            self.out_control.check([(fprop.x, fprop.w, fprop.hadamard) for fprop in fprops])
        if self.osci_reset is not None:
            self.osci_reset.check(steps, [(fprop.w, fprop.hadamard) for fprop in fprops])

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
        if self.out_control is not None and self.out_control.couples_samples(sequence_length):
            return True
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
