"""The precision recipe of a run: the dtype of the forward pass, and the GEMMs that are quantised.

Under every recipe master weights, optimiser states, weight gradients and the loss are fp32;
embeddings, norms, softmax, attention's products and the output head are in `compute`. A format that
the hardware does not have is emulated to the last bit (`kernels/emulate.py`).
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kernels import native
from kernels.philox import Dice, NoiseKey
from models.compiled_kernels import compile_kernels
from models.contract import blocks
from models.delayed_scaling import AmaxHistory
from models.language_model import LanguageModel
from models.osci_reset import OsciReset
from models.out_control import OutControl
from models.precision_config import LinearConfig, PrecisionConfig
from models.quantised_layer import QuantisedLinear, Shared
from models.recipes import linear_recipe


@dataclass(frozen=True)
class Choice:
    """A row of the resolved table: one operand of one linear layer.

    Args:
        layer: name of its module.
        operand: one of `kernels.quantised_linear.OPERANDS`.
        format: format, block, scale and rounding in words; the compute dtype if not quantised.
        hadamard: size of the groups of the Hadamard transform, 0 for none.
        backend: what computes the GEMM.
        why: the rule or key of the recipe that decided.
    """

    layer: str
    operand: str
    format: str
    hadamard: int
    backend: str
    why: str


class Precision:
    """A recipe on a device; `prepare` applies it to a model, `begin` and `autocast` to a step."""

    def __init__(
        self, cfg: PrecisionConfig, device: torch.device, *, planning: bool = False
    ) -> None:
        self.cfg, self.device, self.compute, self.planning = cfg, device, cfg.compute, planning
        self.table: list[Choice] = []
        self.shared = Shared(device=device, check_finite=cfg.check_finite)
        self._linears: list[QuantisedLinear] = []
        self._history: AmaxHistory | None = None
        self._osci_reset: OsciReset | None = None
        self._out_control: OutControl | None = None
        # TransformerEngine's recipes by the directions (forward, backward) that are quantised.
        self._native: dict[tuple[bool, bool], Any] = {}
        self._native_now: Any = None
        self._address = {"seed": 0, "step": 0}

    @property
    def native(self) -> bool:
        """Whether TransformerEngine computes some of the layers."""
        return bool(self._native)

    @property
    def backends(self) -> list[str]:
        """What computes the GEMMs, without the reasons of the table."""
        return sorted({choice.backend.partition(":")[0] for choice in self.table})

    @property
    def probing(self) -> bool:
        """Whether statistics of the operands are recorded in this step."""
        return self.shared.probing

    def prepare(self, model: LanguageModel) -> None:
        """Replace the linear layers that the recipe names by quantised ones with the same weights.

        Raises:
            ValueError: a pattern matches no layer, no layer is quantised, a width is not a multiple
                of a block, or backend=native is not possible.
        """
        if not self.cfg.quantised:
            return
        compile_kernels()
        unquantised = self._unquantised(model)
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        _refuse_idle_patterns(self.cfg, [_without_adapter(name) for name, _ in linears])
        passed_over = self._find_native()
        for index, (name, linear) in enumerate(linears):
            why = unquantised.get(name)
            shown = _without_adapter(name)
            chosen, reason = _choose(self.cfg, shown)
            backend = "torch"
            if why is None and chosen is not None:
                backend, cost = self._replace(model, name, linear, chosen, index, passed_over)
                reason = "; ".join(part for part in (reason, cost) if part)
            self._describe(shown, chosen if why is None else None, why or reason, backend)
        if not self._linears:
            raise ValueError(
                "precision quantises no layer: see precision.layers, keep, keep_first, keep_last"
            )
        if any(linear.delayed is not None for linear in self._linears):
            self._history = AmaxHistory(self._linears, self.device)
        if self.cfg.osci_reset is not None:
            self._osci_reset = OsciReset(self.cfg.osci_reset, self._linears)
        if self.cfg.out_control is not None:
            self._out_control = OutControl(self.cfg.out_control, self._linears)

    def _unquantised(self, model: nn.Module) -> dict[str, str]:
        """Return the modules that stay in `compute` because of their position: name -> reason."""
        layers = blocks(model)
        first, last = (
            _number(share, len(layers)) for share in (self.cfg.keep_first, self.cfg.keep_last)
        )
        ends = {"keep_first": layers[:first], "keep_last": layers[len(layers) - last :]}
        reasons = {id(m): key for key, end in ends.items() for b in end for m in b.modules()}
        inside = {id(m) for block in layers for m in block.modules()}
        result = {}
        for name, module in model.named_modules():
            if id(module) not in inside:
                result[name] = "outside the blocks"
            elif id(module) in reasons:
                result[name] = reasons[id(module)]
        return result

    def begin(self, step: int, steps: int, *, seed: int = 0) -> None:
        """Set what depends on the step: the late switch, the scales of delayed scaling, probes.

        Call it before the forward pass of `step`, 0 to `steps` - 1. `seed` is that of the noise.
        """
        if not self._linears:
            return
        self._address = {"seed": seed, "step": step}
        at = self.cfg.switch_at
        late = at is not None and step >= (at * steps if at < 1 else at)
        forward, backward = self._switched() if late else (True, True)
        for linear in self._linears:
            linear.select(forward=forward, backward=backward)
        if self._native:
            self._native_now = self._native[forward, backward]
            native.seed_dice(seed, _rank(), step)  # a resumed run draws the same
        if self._history is not None:
            self._history.begin(step)
        if self._osci_reset is not None:
            self._osci_reset.begin(step, steps, forward=forward)
        if self._out_control is not None:
            self._out_control.begin(step, steps)
        every = self.cfg.diagnostics_every
        self.shared.probing = every is not None and step % every == 0
        for linear in self._linears:
            linear.probe.clear()

    def after_update(self) -> None:
        """Change what the recipe changes after the optimiser: weights, formats of channels."""
        if self._osci_reset is not None:
            self._osci_reset.after_update()
        if self._out_control is not None:
            self._out_control.after_update()

    def reserve(self) -> Iterator[None]:
        """Hold in turn what each of the largest steps does, in place of `begin`: to predict it."""
        if self._osci_reset is not None:
            self._osci_reset.reserve()
        yield from [None] if self._out_control is None else self._out_control.reserve()

    @contextmanager
    def same_weights(self, several: bool) -> Iterator[None]:
        """Quantise each weight once inside, where no weight changes: the micro-batches of a step.

        No bit changes. Sharded weights are left out: whole operands would lie on every rank.

        Args:
            several: whether there is more than one forward pass inside; else nothing is kept.
        """
        sharded = any(hasattr(linear.weight, "device_mesh") for linear in self._linears)
        if several and not sharded:
            samples = torch.zeros(1, dtype=torch.int64, device=self.device)
            for linear in self._linears:
                linear.keep_weight(Dice.of(NoiseKey(samples=samples, **self._address)))
        try:
            yield
        finally:
            for linear in self._linears:
                linear.kept = None

    @contextmanager
    def autocast(self, noise: NoiseKey | None = None) -> Iterator[None]:
        """Enter the context of a forward pass; `noise` is the key of stochastic rounding's bits."""
        self.shared.dice = Dice.of(noise) if noise is not None and self._linears else None
        if self.compute == "fp32":
            yield
            return
        engine = native.native_autocast(self._native_now) if self._native else nullcontext()
        with torch.autocast(self.device.type, dtype=torch.bfloat16), engine:
            yield

    def recompute_contexts(
        self,
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return TransformerEngine's contexts of a checkpointed forward pass and its repetition."""
        return native.recompute_contexts(self._native_now)

    def readings(self) -> dict[str, float]:
        """Return the statistics of this step by precision/<layer>/<operand>/<statistic>.

        {} in a step that is not probed.
        """
        return {
            f"precision/{linear.name}/{operand}/{key}": float(value)
            for linear in self._linears
            for operand, statistics in linear.probe.items()
            for key, value in statistics.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resume needs: histories, sums of windows, outliers."""
        native_states = {
            f"native.{n.name}": n.native[0].get_extra_state() for n in self._linears if n.native
        }
        state = {name: tensor for name, tensor in native_states.items() if tensor.numel()}
        if self._history is not None:
            state |= self._history.state()
        if self._osci_reset is not None:
            state |= self._osci_reset.state()
        if self._out_control is not None:
            state |= self._out_control.state()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the `state` of an earlier attempt; that of another backend is ignored."""
        if self._history is not None and "amax_history" in state:
            self._history.load(state)
        if self._osci_reset is not None:
            self._osci_reset.load(state)
        if self._out_control is not None:
            self._out_control.load(state)
        for linear in self._linears:
            if linear.native and f"native.{linear.name}" in state:
                linear.native[0].set_extra_state(state[f"native.{linear.name}"])

    def _switched(self) -> tuple[bool, bool]:
        """Return whether (forward, backward) is quantised after the late switch."""
        return self.cfg.switch == "backward", self.cfg.switch == "forward"

    def _find_native(self) -> str | None:
        """Make TransformerEngine's recipes; return None, or why it cannot be used.

        Raises:
            ValueError: it cannot be used, and backend=native.
        """
        try:
            if self.cfg.backend == "emulated":
                raise native.Unsupported("as asked for")
            if self.planning:
                return None
            if self.cfg.diagnostics_every or self.cfg.check_finite:
                raise native.Unsupported("diagnostics and checks look at emulated operands")
            if self.cfg.osci_reset is not None:
                raise native.Unsupported("osci_reset compares weights that are quantised here")
            if self.cfg.out_control is not None:
                raise native.Unsupported("out_control has two formats in one product")
            states = {(True, True)}
            if self.cfg.switch_at is not None:
                states.add(self._switched())
            for forward, backward in states:
                engine = None
                if forward or backward:
                    recipe = linear_recipe(self.cfg.default, forward=forward, backward=backward)
                    engine = native.native_recipe(recipe, self.device)
                self._native[forward, backward] = engine
        except native.Unsupported as error:
            self._native.clear()
            return self._passed_over(str(error))
        return None

    def _passed_over(self, why: str) -> str:
        if self.cfg.backend == "native":
            raise ValueError(f"precision.backend=native: {why}; use precision.backend=auto")
        return why

    def _replace(
        self,
        model: nn.Module,
        name: str,
        linear: nn.Linear,
        chosen: LinearConfig,
        index: int,
        passed_over: str | None,
    ) -> tuple[str, str]:
        """Replace `linear` by a quantised layer; return what computes it, the cost of padding."""
        parent, _, attribute = name.rpartition(".")
        quantised = QuantisedLinear(linear, chosen, self.shared, index, name)
        quantised.fit(pad=self.cfg.pad is not False)
        setattr(model.get_submodule(parent), attribute, quantised)
        self._linears.append(quantised)
        return self._backend_of(quantised, passed_over), quantised.cost_of_padding()

    def _backend_of(self, linear: QuantisedLinear, passed_over: str | None) -> str:
        """Return the name of what computes a layer.

        Args:
            passed_over: why TransformerEngine computes none, None if it can.
        """
        if self.planning:
            return {"auto": "native or emulated"}.get(self.cfg.backend, self.cfg.backend)
        if passed_over is None:
            other = linear_recipe(linear.chosen) != linear_recipe(self.cfg.default)
            why = "a rule of its own" if other else linear.go_native()
            if why is None:
                return "TransformerEngine"
            passed_over = self._passed_over(f"{linear.name}: {why}")
        if self.cfg.backend != "auto":
            return f"emulated: {passed_over}"
        why = linear.go_tensor_cores(self.cfg.out_control)
        if why is None:
            return f"torch._scaled_mm: {passed_over}"
        return "emulated on cpu" if self.device.type == "cpu" else f"emulated: {passed_over}; {why}"

    def _describe(self, name: str, chosen: LinearConfig | None, why: str, backend: str) -> None:
        """Add the six operands of a layer to the table."""
        linear = chosen or LinearConfig()
        for operand, cfg in linear.operands().items():
            gemm, _, letter = operand.partition(".")
            hadamard = getattr(linear, gemm).hadamard
            computes = "torch" if cfg.format == "compute" else backend
            words = cfg.describe() or self.compute
            if letter != "g" and getattr(getattr(linear, gemm), "saved", "") == "quantised":
                words = f"{words} of quantised fprop.{letter}"
            self.table.append(Choice(name, operand, words, hadamard, computes, why))


def _choose(cfg: PrecisionConfig, name: str) -> tuple[LinearConfig | None, str]:
    """Return (formats of layer `name`, None for `compute`; the key or rule that decided)."""
    for rule in cfg.rules:
        if fnmatchcase(name, rule.match):
            return (None if rule.plain else rule), f"rule {rule.match}"
    for pattern in cfg.keep:
        if fnmatchcase(name, pattern):
            return None, f"keep {pattern}"
    if not any(fnmatchcase(name, pattern) for pattern in cfg.layers):
        return None, "not in layers"
    return (None if cfg.default.plain else cfg.default), "default"


def _without_adapter(name: str) -> str:
    """Return the name that a layer has without the adapter around it."""
    return name.removesuffix(".base")


def _refuse_idle_patterns(cfg: PrecisionConfig, names: list[str]) -> None:
    """Raise ValueError if a pattern of the recipe matches none of the layers `names`."""
    patterns = {
        "layers": cfg.layers,
        "keep": cfg.keep,
        "rules": tuple(rule.match for rule in cfg.rules if not rule.optional),
    }
    for key, group in patterns.items():
        for pattern in group:
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:4])
                raise ValueError(
                    f"precision.{key}: {pattern!r} matches no layer; there are: {shown}, ..."
                )


def _rank() -> int:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if together else 0


def _number(share: float, blocks: int) -> int:
    """Return the number of blocks meant by `share`, a number or, below 1, a share of `blocks`."""
    return min(blocks, round(share * blocks) if share < 1 else int(share))


def bf16_slowdown() -> float:
    """Return the time of a bf16 product on this CPU over that of an fp32 one, at least 1."""
    bf16, fp32 = (_product_s(dtype) for dtype in (torch.bfloat16, torch.float32))
    return max(1.0, bf16 / fp32)


def _product_s(dtype: torch.dtype) -> float:
    """Return the seconds of a 512 x 512 x 512 product: the best of three, after one to warm up."""
    a = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return best
