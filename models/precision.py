"""The precision recipe of a run: the dtype of the forward pass, and which GEMMs are quantised.

Master weights, optimiser states, the gradient of a weight and the loss are fp32 under every recipe;
embeddings, norms, softmax, attention's products and the output head are in `compute`. Where the
hardware has no unit for a format it is emulated to the last bit (`kernels/emulate.py`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kernels import native
from kernels.philox import Dice, NoiseKey
from kernels.quantised_linear import OPERANDS
from models.compiled_kernels import compile_kernels
from models.contract import blocks
from models.language_model import LanguageModel
from models.precision_config import LinearConfig, PrecisionConfig
from models.quantised_layer import QuantisedLinear, Shared
from models.recipes import linear_recipe

_HISTORY = 1024  # steps that delayed scaling looks back


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

    def __init__(
        self, cfg: PrecisionConfig, device: torch.device, *, planning: bool = False
    ) -> None:
        self.cfg, self.device, self.compute, self.planning = cfg, device, cfg.compute, planning
        self.table: list[Choice] = []
        self.shared = Shared(device=device, check_finite=cfg.check_finite)
        self._linears: list[QuantisedLinear] = []
        self._slot = 0
        self._native: dict[
            tuple[bool, bool], Any
        ] = {}  # TransformerEngine's recipe by what is switched on
        self._now: Any = None

    @property
    def probing(self) -> bool:
        """True in a step whose operands are looked at."""
        return self.shared.probing

    def prepare(self, model: LanguageModel) -> None:
        """Put quantised linears in the place of those that the recipe names; weights stay theirs.

        Raises:
            ValueError: a pattern matches no layer, no layer is quantised, or a width does not fit a block.
        """
        if not self.cfg.quantised:
            return
        compile_kernels()
        layers = blocks(model)
        first, last = (
            _number(share, len(layers)) for share in (self.cfg.keep_first, self.cfg.keep_last)
        )
        high = {id(m): "keep_first" for block in layers[:first] for m in block.modules()}
        high |= {
            id(m): "keep_last" for block in layers[len(layers) - last :] for m in block.modules()
        }
        inside = {id(m) for block in layers for m in block.modules()}
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        self._refuse_idle_patterns([name for name, _ in linears])
        passed_over = self._look_for_native()
        for index, (name, linear) in enumerate(linears):
            why = "outside the blocks" if id(linear) not in inside else high.get(id(linear))
            chosen, reason = self._choose(name)
            backend = "torch"
            if why is None and chosen is not None:
                backend = self._replace(model, name, linear, chosen, index, passed_over)
            self._describe(name, chosen if why is None else None, why or reason, backend)
        if not self._linears:
            raise ValueError(
                "precision quantises no layer: see precision.layers, keep, keep_first, keep_last"
            )
        history = torch.zeros(len(self._linears), len(OPERANDS), _HISTORY, device=self.device)
        self._history = history if self._delayed else history[..., :0]

    def begin(self, step: int, steps: int) -> None:
        """Set what changes from step to step: the late switch, the scales of delayed scaling."""
        if not self._linears:
            return
        at = self.cfg.switch_at
        late = at is not None and step >= (at * steps if at < 1 else at)
        forward, backward = self._switched() if late else (True, True)
        for linear in self._linears:
            linear.select(forward=forward, backward=backward)
        if self._native:
            self._now = self._native[forward, backward]
            torch.cuda.manual_seed(step)  # its dice: a resumed run throws the same ones
        if self._delayed:
            self._roll(step)
        every = self.cfg.diagnostics_every
        self.shared.probing = every is not None and step % every == 0
        for linear in self._linears:
            linear.probe.clear()

    @contextmanager
    def autocast(self, noise: NoiseKey | None = None) -> Iterator[None]:
        """Enter the context of a forward pass; `noise` addresses the random bits of training."""
        self.shared.dice = Dice.of(noise) if noise is not None and self._linears else None
        if self.compute == "fp32":
            yield
            return
        engine = native.native_autocast(self._now) if self._native else nullcontext()
        with torch.autocast(self.device.type, dtype=torch.bfloat16), engine:
            yield

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
        kept = {
            f"native.{n.name}": n.native[0].get_extra_state() for n in self._linears if n.native
        }
        found = {name: tensor for name, tensor in kept.items() if tensor.numel()}
        if self._delayed:
            self._file()
            found["amax_history"] = self._history
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up the state of an earlier attempt; one of another backend has nothing to give."""
        if self._delayed and "amax_history" in state:
            self._history.copy_(state["amax_history"])
        for linear in self._linears:
            if linear.native and f"native.{linear.name}" in state:
                linear.native[0].set_extra_state(state[f"native.{linear.name}"])

    def _switched(self) -> tuple[bool, bool]:
        """Return whether (forward, backward) is quantised after the switch."""
        return self.cfg.switch == "backward", self.cfg.switch == "forward"

    def _look_for_native(self) -> str | None:
        """Find TransformerEngine's recipes; return why it is passed over.

        Raises:
            ValueError: and backend=native.
        """
        try:
            if self.cfg.backend == "emulated":
                raise native.Unsupported("as asked for")
            if self.planning:
                return None
            if self.cfg.diagnostics_every or self.cfg.check_finite:
                raise native.Unsupported("diagnostics and checks look at emulated operands")
            states = {(True, True)} | (
                {self._switched()} if self.cfg.switch_at is not None else set()
            )
            for forward, backward in states:
                made = None
                if forward or backward:
                    recipe = linear_recipe(self.cfg.default, forward=forward, backward=backward)
                    made = native.native_recipe(recipe, self.device)
                    native.self_test(made, self.device)
                self._native[forward, backward] = made
        except native.Unsupported as error:
            self._native.clear()
            return self._passed_over(str(error))
        return None

    def _passed_over(self, why: str) -> str:
        if self.cfg.backend == "native":
            raise ValueError(f"precision.backend=native: {why}; use precision.backend=auto")
        return why

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
        patterns = {
            "layers": self.cfg.layers,
            "keep": self.cfg.keep,
            "rules": tuple(r.match for r in self.cfg.rules),
        }
        for key, group in patterns.items():
            for pattern in group:
                if not any(fnmatchcase(name, pattern) for name in names):
                    shown = ", ".join(names[:4])
                    raise ValueError(
                        f"precision.{key}: {pattern!r} matches no layer; there are: {shown}, ..."
                    )

    def _replace(
        self,
        model: nn.Module,
        name: str,
        linear: nn.Linear,
        chosen: LinearConfig,
        index: int,
        passed_over: str | None,
    ) -> str:
        """Put a quantised linear in the place of `linear`; return what computes it."""
        parent, _, last = name.rpartition(".")
        made = QuantisedLinear(linear, chosen, self.shared, index, name)
        made.fit(pad=self.cfg.pad)
        setattr(model.get_submodule(parent), last, made)
        self._linears.append(made)
        if self.planning:
            return {"auto": "native or emulated"}.get(self.cfg.backend, self.cfg.backend)
        if passed_over is None:
            other = linear_recipe(chosen) != linear_recipe(self.cfg.default)
            why = "a rule of its own" if other else made.go_native()
            if why is None:
                return "TransformerEngine"
            passed_over = self._passed_over(f"{name}: {why}")
        on_cpu = self.device.type == "cpu" and self.cfg.backend == "auto"
        return "emulated on cpu" if on_cpu else f"emulated: {passed_over}"

    def _describe(self, name: str, chosen: LinearConfig | None, why: str, backend: str) -> None:
        for operand, how in (chosen or LinearConfig()).operands().items():
            gemm = getattr(chosen or LinearConfig(), operand.partition(".")[0])
            computes = "torch" if how.format == "compute" else backend
            self.table.append(
                Choice(name, operand, how.describe() or self.compute, gemm.hadamard, computes, why)
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


def bf16_slowdown() -> float:
    """Return how many times as long as in fp32 a product takes in bf16 on this CPU, 1 where it is faster."""
    bf16, fp32 = (_product_s(dtype) for dtype in (torch.bfloat16, torch.float32))
    return max(1.0, bf16 / fp32)


def _product_s(dtype: torch.dtype) -> float:
    """Return the seconds of one 512 x 512 x 512 product, the best of three."""
    a = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return best
