"""The precision recipe of a run: the dtype of the forward pass, and which GEMMs are quantised.

Master weights, optimiser states, the gradient of a weight and the loss are fp32 under every recipe;
embeddings, norms, softmax, attention's products and the output head are in `compute`. Where the
hardware has no unit for a format it is emulated to the last bit (`kernels/emulate.py`).
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.philox import Dice, NoiseKey
from kernels.quantised_linear import OPERANDS, Delayed, LinearRecipe, Probe, quantised_linear
from models.config import config, neutral
from models.language_model import LanguageModel
from models.precision_config import (
    DgradConfig,
    FpropConfig,
    LinearConfig,
    RuleConfig,
    WgradConfig,
)

_HISTORY = 1024  # steps that delayed scaling looks back


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
        backend: native refuses to run where the hardware lacks a format; auto emulates it.
    """

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
    check_finite: bool = False
    diagnostics_every: int | None = None
    backend: Literal["auto", "emulated", "native"] = "auto"

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

    def build(self, device: torch.device) -> "Precision":
        """Return the recipe on `device`.

        Raises:
            ValueError: the device cannot compute in the dtype or format asked for.
        """
        cuda = self.compute == "bf16" and device.type == "cuda"
        if cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            raise ValueError(
                "precision.compute=bf16 needs an Ampere GPU or later; "
                f"this is {name}; use precision=fp32"
            )
        if self.backend == "native" and self.quantised:
            raise ValueError(
                f"precision.backend=native: {device.type} has no native path for these formats here; "
                "use precision.backend=auto"
            )
        return Precision(self, device)

    def notice(self, device_type: str) -> str | None:
        """Return what a user should know of this recipe on this machine, None if there is nothing.

        On a CPU one bf16 product is timed: without AMX or AVX512-BF16 it can be many times slower.
        """
        if self.compute != "bf16" or device_type != "cpu":
            return None
        bf16, fp32 = (_product_s(dtype) for dtype in (torch.bfloat16, torch.float32))
        if bf16 < 1.5 * fp32:
            return None
        return (
            f"precision=bf16: on this CPU a bf16 product takes {bf16 / fp32:.1f} times as long as fp32; "
            "expect these cells to be slower"
        )


def _product_s(dtype: torch.dtype) -> float:
    """Return the seconds of one 512 x 512 x 512 product, the best of three."""
    a = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Choice:
    """One operand of one layer in the resolved table: what it is, and why."""

    layer: str
    operand: str
    format: str
    hadamard: int
    backend: str
    why: str


class Precision:
    """A recipe bound to a device, and after `prepare` to a model."""

    def __init__(self, cfg: PrecisionConfig, device: torch.device) -> None:
        self.cfg, self.device, self.compute = cfg, device, cfg.compute
        self.table: list[Choice] = []
        self.dice: Dice | None = None
        self._linears: list[QuantisedLinear] = []
        self._slot, self.probing = 0, False

    def prepare(self, model: LanguageModel) -> None:
        """Put quantised linears in the place of those that the recipe names; weights stay theirs.

        Raises:
            ValueError: a pattern matches no layer, no layer is quantised, or a width does not fit a block.
        """
        if not self.cfg.quantised:
            return
        blocks = model.blocks()
        first, last = (_number(share, len(blocks)) for share in (self.cfg.keep_first, self.cfg.keep_last))  # fmt: skip
        high = {id(m): "keep_first" for block in blocks[:first] for m in block.modules()}
        high |= {id(m): "keep_last" for block in blocks[len(blocks) - last :] for m in block.modules()}  # fmt: skip
        inside = {id(m) for block in blocks for m in block.modules()}
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        self._refuse_idle_patterns([name for name, _ in linears])
        for index, (name, linear) in enumerate(linears):
            why = "outside the blocks" if id(linear) not in inside else high.get(id(linear))
            chosen, reason = self._choose(name)
            if why is None and chosen is not None:
                self._replace(model, name, linear, chosen, index)
            self._describe(name, chosen if why is None else None, why or reason)
        if not self._linears:
            raise ValueError("precision quantises no layer: see precision.layers, keep, keep_first, keep_last")  # fmt: skip
        history = torch.zeros(len(self._linears), len(OPERANDS), _HISTORY, device=self.device)
        self._history = history if self._delayed else history[..., :0]

    def begin(self, step: int, steps: int) -> None:
        """Set what changes from step to step: the late switch, the scales of delayed scaling."""
        if not self._linears:
            return
        at = self.cfg.switch_at
        late = at is not None and step >= (at * steps if at < 1 else at)
        forward = not (late and self.cfg.switch in ("both", "forward"))
        backward = not (late and self.cfg.switch in ("both", "backward"))
        for linear in self._linears:
            linear.select(forward=forward, backward=backward)
        if self._delayed:
            self._roll(step)
        every = self.cfg.diagnostics_every
        self.probing = every is not None and step % every == 0
        for linear in self._linears:
            linear.probe.clear()

    def autocast(self, noise: NoiseKey | None = None) -> AbstractContextManager[Any]:
        """Return the context of a forward pass; `noise` addresses the random bits of training."""
        self.dice = Dice.of(noise) if noise is not None and self._linears else None
        if self.compute == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def readings(self) -> dict[str, float]:
        """Return precision/<layer>/<operand>/<statistic> of this step, {} where it was not looked at."""
        return {
            f"precision/{linear.name}/{operand}/{key}": float(value)
            for linear in self._linears
            for operand, found in linear.probe.items()
            for key, value in found.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return what a resume needs: the magnitudes of earlier steps under delayed scaling."""
        if not self._delayed:
            return {}
        self._file()
        return {"amax_history": self._history}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up the state of an earlier attempt."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _choose(self, name: str) -> tuple[LinearConfig | None, str]:
        for rule in self.cfg.rules:
            if fnmatchcase(name, rule.match):
                return (None if rule.plain else rule), f"rule {rule.match}"
        for pattern in self.cfg.keep:
            if fnmatchcase(name, pattern):
                return None, f"keep {pattern}"
        if not any(fnmatchcase(name, pattern) for pattern in self.cfg.layers):
            return None, "not in layers"
        return (None if self.cfg.default.plain else self.cfg.default), "default"

    def _refuse_idle_patterns(self, names: list[str]) -> None:
        patterns = {"layers": self.cfg.layers, "keep": self.cfg.keep, "rules": tuple(r.match for r in self.cfg.rules)}  # fmt: skip
        for key, group in patterns.items():
            for pattern in group:
                if not any(fnmatchcase(name, pattern) for name in names):
                    shown = ", ".join(names[:4])
                    raise ValueError(f"precision.{key}: {pattern!r} matches no layer; there are: {shown}, ...")  # fmt: skip

    def _replace(
        self, model: nn.Module, name: str, linear: nn.Linear, chosen: LinearConfig, index: int
    ) -> None:
        parent, _, last = name.rpartition(".")
        made = QuantisedLinear(linear, chosen, self, index, name)
        made.fit(pad=self.cfg.pad)
        setattr(model.get_submodule(parent), last, made)
        self._linears.append(made)

    def _describe(self, name: str, chosen: LinearConfig | None, why: str) -> None:
        for operand, how in (chosen or LinearConfig()).operands().items():
            gemm = getattr(chosen or LinearConfig(), operand.partition(".")[0])
            quantised = how.format != "compute"
            backend = f"emulated on {self.device.type}" if quantised else "torch"
            self.table.append(
                Choice(name, operand, how.describe() or self.compute, gemm.hadamard, backend, why)
            )

    @property
    def _delayed(self) -> bool:
        return any(linear.delayed is not None for linear in self._linears)

    def _file(self) -> None:
        """Enter the magnitudes seen since `begin` in the history, the largest of all ranks."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        for number, linear in enumerate(self._linears):
            if linear.delayed is not None:
                seen = linear.delayed.seen
                if together:
                    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
                slot = self._history[number, :, self._slot]
                slot.copy_(torch.maximum(slot, seen))

    def _roll(self, step: int) -> None:
        """Begin a new entry of the history and make scales of the largest in sight."""
        self._file()
        self._slot = step % _HISTORY
        self._history[..., self._slot] = 0.0
        for number, linear in enumerate(self._linears):
            if linear.delayed is not None:
                linear.delayed.seen.zero_()
                linear.delayed.amax.copy_(self._history[number].amax(dim=-1))


def _number(share: float, blocks: int) -> int:
    """Return how many of `blocks` are meant by a number of them or a share below 1."""
    return min(blocks, round(share * blocks) if share < 1 else int(share))


class QuantisedLinear(nn.Linear):
    """A linear whose GEMMs follow a recipe; it has the parameters of the one that it replaces."""

    def __init__(
        self, linear: nn.Linear, chosen: LinearConfig, precision: Precision, index: int, name: str
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.chosen, self.index, self.name = chosen, index, name
        self.probe: Probe = {}
        self._precision = [precision]  # a list: no submodule, no copy
        self._recipes: dict[tuple[bool, bool], LinearRecipe] = {}
        self.missing = {"k": 0, "n": 0}
        self.delayed: Delayed | None = None
        if any(how.scale == "delayed" for how in chosen.operands().values()):
            device = precision.device
            self.delayed = Delayed(*(torch.zeros(len(OPERANDS), device=device) for _ in range(2)))
        self.select(forward=True, backward=True)

    def select(self, *, forward: bool, backward: bool) -> None:
        """Choose which GEMMs are quantised from now on."""
        key = (forward, backward)
        if key not in self._recipes:
            self._recipes[key] = self.chosen.recipe(forward=forward, backward=backward)
        self.recipe = self._recipes[key]

    def fit(self, *, pad: bool) -> None:
        """Check widths against blocks and Hadamard groups, all powers of two or multiples of each other.

        Raises:
            ValueError: one does not fit and `pad` is not set.
        """
        sizes = {"k": self.in_features, "n": self.out_features}
        for what, letter, part in self._parts():
            missing = -sizes[letter] % part
            if missing and not pad:
                raise ValueError(
                    f"{self.name}: {letter}={sizes[letter]} is not a multiple of {part} ({what}); change the "
                    f"width or the block, set precision.pad=true, or precision.keep=['{self.name}']"
                )
            self.missing[letter] = max(self.missing[letter], missing)

    def _parts(self) -> Iterator[tuple[str, str, int]]:
        summed = {"fprop": "k", "dgrad": "n"}
        for operand, how in self.chosen.operands().items():
            gemm, _, letter = operand.partition(".")
            recipe = how.recipe()
            if recipe is None:
                continue
            across, along = (max(1, size) for size in recipe.quantiser.block)
            if gemm in summed:
                yield f"the block of {operand}", summed[gemm], along
            if letter == "w":
                yield f"the block of {operand}", "n" if gemm == "fprop" else "k", across
            if gemm == "wgrad":
                yield f"the block of {operand}", "n" if letter == "g" else "k", across
        for gemm, letter in summed.items():
            if getattr(self.chosen, gemm).hadamard:
                yield f"hadamard of {gemm}", letter, getattr(self.chosen, gemm).hadamard

    def forward(self, input: Tensor) -> Tensor:
        """Return input W^T + b."""
        precision = self._precision[0]
        if precision.cfg.check_finite and not bool(input.isfinite().all()):
            raise ValueError(f"precision.check_finite: the input of {self.name} has NaN or inf")
        dice = precision.dice if torch.is_grad_enabled() else None
        weight, (k, n) = self.weight, self.missing.values()
        if k or n:
            input, weight = F.pad(input, (0, k)), F.pad(weight, (0, k, 0, n))
        y = quantised_linear(
            input,
            weight,
            self.recipe,
            layer=self.index,
            dice=dice,
            delayed=self.delayed,
            probe=self.probe if precision.probing and dice is not None else None,
        )
        y = y[..., : self.out_features] if n else y
        return y if self.bias is None else y + self.bias.to(y.dtype)
