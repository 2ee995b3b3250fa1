"""Delayed scaling: FP8 scales made of the largest magnitudes of earlier steps.

Shape legend: layers = quantised linear layers, operands = the six of `OPERANDS`, history = steps.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.quantised_linear import OPERANDS
from models.quantised_layer import QuantisedLinear

_HISTORY = 1024  # steps


class AmaxHistory:
    """The largest magnitude of each operand of each layer in each of the last 1024 steps.

    Layers without delayed scaling have rows of zeros.
    """

    def __init__(self, linears: Sequence[QuantisedLinear], device: torch.device) -> None:
        self.linears = linears
        self.amax: Float[Tensor, "layers operands history"]
        self.amax = torch.zeros(len(linears), len(OPERANDS), _HISTORY, device=device)
        self._slot = 0

    def record(self) -> None:
        """Enter the magnitudes seen since `begin` under its step, the largest of all ranks."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        for number, linear in enumerate(self.linears):
            if linear.delayed is not None:
                seen = linear.delayed.seen
                if together:
                    torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
                slot = self.amax[number, :, self._slot]
                slot.copy_(torch.maximum(slot, seen))

    def begin(self, step: int) -> None:
        """Record the step before, and set the scales of `step` to the largest of the history."""
        self.record()
        self._slot = step % _HISTORY
        self.amax[..., self._slot] = 0.0
        for number, linear in enumerate(self.linears):
            if linear.delayed is not None:
                linear.delayed.seen.zero_()
                linear.delayed.amax.copy_(self.amax[number].amax(dim=-1))
