"""OutControl of TetraJet-v2 (arXiv 2510.27527): a few input channels of each layer in FP8.

In a window of steps the L2 norm of each input channel, over all tokens of a step, is summed; the
channels with the largest sums are those that `kernels.outliers` takes in FP8 from then on.

Squares are summed in fp64 over micro-batches and ranks, so that their order does not decide. Where
activations are recomputed every square counts twice, which leaves the order of channels as it is.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.outliers import Columns
from models.out_control_config import OutControlConfig
from models.quantised_layer import QuantisedLinear

_NORMS, _OUTLIERS = "out_control.norms", "out_control.outliers"


class OutControl:
    """The sums of the window, and what came of them."""

    def __init__(self, cfg: OutControlConfig, linears: Sequence[QuantisedLinear]) -> None:
        self.cfg = cfg
        self._linears = [
            linear for linear in linears if cfg.takes(linear.chosen.fprop.x, linear.chosen.fprop.w)
        ]
        self._norms: dict[str, Tensor] = {}
        self._ends = False

    def begin(self, step: int, steps: int) -> None:
        """Prepare for `step`, 0 to `steps` - 1; call it before its forward pass."""
        place = self.cfg.place(step, steps)
        if place is None:
            self._norms.clear()
        elif place == 0:
            self._norms = {linear.name: _zeros(linear) for linear in self._linears}
        for linear in self._linears:
            linear.squares = _zeros(linear) if self._norms else None
        self._ends = place == self.cfg.window - 1

    def reserve(self) -> Iterator[None]:
        """Hold in turn what a step of the window holds and one after it, which keeps no codes."""
        for linear in self._linears:
            linear.squares = _zeros(linear)
        yield
        for linear in self._linears:
            linear.squares = None
            number = self.cfg.number(linear.width)
            self._set(linear, torch.arange(number, device=linear.shared.device))
        yield

    @torch.no_grad()
    def after_update(self) -> None:
        """Add the norms of this step; at the end of the window choose the outliers."""
        if not self._norms:
            return
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        for linear in self._linears:
            assert linear.squares is not None
            if together:
                torch.distributed.all_reduce(linear.squares)
            norms = self._norms[linear.name]
            norms += linear.squares.sqrt()
            linear.squares = None
            if self._ends:
                order = norms.sort(descending=True, stable=True).indices
                self._set(linear, order[: self.cfg.number(linear.width)])
        if self._ends:
            self._norms.clear()

    def state(self) -> dict[str, Tensor]:
        """Return the sums of an open window, and the outliers where they are chosen."""
        norms = {f"{_NORMS}.{name}": norms for name, norms in self._norms.items()}
        chosen = {
            f"{_OUTLIERS}.{linear.name}": linear.columns.outliers
            for linear in self._linears
            if linear.columns is not None
        }
        return norms | chosen

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`."""
        for linear in self._linears:
            device = linear.shared.device
            norms, outliers = (state.get(f"{k}.{linear.name}") for k in (_NORMS, _OUTLIERS))
            if norms is not None:
                self._norms[linear.name] = norms.to(device)
            if outliers is not None:
                self._set(linear, outliers.to(device))

    def _set(self, linear: QuantisedLinear, outliers: Tensor) -> None:
        linear.columns = Columns.of(outliers, linear.width)


def _zeros(linear: QuantisedLinear) -> Tensor:
    return torch.zeros(linear.width, dtype=torch.float64, device=linear.shared.device)
