"""OsciReset of TetraJet-v2 (arXiv 2510.27527): weights that oscillate about the edge of a bin.

In a window of steps both ways are summed for each weight: that of the weight, |dw|, and that of
what the forward pass makes of it, |dQ(w)|. Where the second is a multiple of the first the weight
goes to and fro across an edge; at the end of the window it is set to Q(w), in the middle of the
bin. The optimiser's moments stay.

All of it is a function of the weights before and after each update, which micro-batches and ranks
share. Sharded weights are gathered, one layer at a time, to be quantised.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.osci_reset_config import OsciResetConfig
from models.quantised_layer import QuantisedLinear

_MOVED, _MOVED_QUANTISED = "osci_reset.moved", "osci_reset.moved_quantised"


class OsciReset:
    """The sums of a window, and the weights before the update of a step inside it."""

    def __init__(self, cfg: OsciResetConfig, linears: Sequence[QuantisedLinear]) -> None:
        self.cfg = cfg
        self._linears = {
            linear.name: linear
            for linear in linears
            if linear.weight.requires_grad and linear.chosen.fprop.w.format != "compute"
        }
        self._sums: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._ends = False

    def begin(self, step: int, steps: int, *, forward: bool) -> None:
        """Prepare for the update of `step`, 0 to `steps` - 1; call it before that.

        Args:
            forward: whether this step quantises its forward pass; else its window is given up.
        """
        self._before.clear()
        place = self.cfg.place(step, steps) if forward else None
        if place is None or place == 0:
            self._sums.clear()
        if place == 0:
            self._start()
        if self._sums:  # else the run was resumed from one without them
            self._before = {n: _copy(linear.weight) for n, linear in self._linears.items()}
        self._ends = place == self.cfg.window - 1

    def reserve(self) -> None:
        """Hold what a step of a window holds."""
        self.begin(self.cfg.first(1), 1, forward=True)

    @torch.no_grad()
    def after_update(self) -> None:
        """Add what the update has moved; at the end of a window reset what oscillates."""
        for name, before in self._before.items():
            linear = self._linears[name]
            weight, quantised = linear.weight, _quantised(linear, linear.weight)
            moved, moved_quantised = (
                self._sums[key] for key in (f"{_MOVED}.{name}", f"{_MOVED_QUANTISED}.{name}")
            )
            moved += (weight - before).abs()
            moved_quantised += (quantised - _quantised(linear, before)).abs()
            if self._ends:
                # A weight that did not move has 0 / 0, which is no oscillation.
                oscillates = moved_quantised / moved >= self.cfg.threshold
                weight.copy_(torch.where(oscillates, quantised, weight))
        self._before.clear()
        if self._ends:
            self._sums.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the sums of an open window."""
        return dict(self._sums)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`, whose tensors are whole."""
        names = {f"{kind}.{n}": n for n in self._linears for kind in (_MOVED, _MOVED_QUANTISED)}
        if names.keys() <= state.keys():
            self._sums = {
                key: _like(state[key], self._linears[name].weight) for key, name in names.items()
            }

    def _start(self) -> None:
        for name, linear in self._linears.items():
            for kind in (_MOVED, _MOVED_QUANTISED):
                self._sums[f"{kind}.{name}"] = torch.zeros_like(linear.weight.detach())


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().clone()


def _quantised(linear: QuantisedLinear, weight: Tensor) -> Tensor:
    """Return Q(weight), in the shards of `weight`."""
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return _like(linear.quantised_weight(whole), weight)


def _like(whole: Tensor, weight: Any) -> Tensor:
    """Return `whole` on the device and in the shards of `weight`."""
    whole = whole.to(weight.device)
    if not hasattr(weight, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  (it takes 0.8 s)

    return distribute_tensor(whole, weight.device_mesh, weight.placements)
