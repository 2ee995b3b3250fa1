"""Delayed scaling: FP8 scales made of the largest magnitudes of earlier steps.

Shape legend: layers = quantised linear layers, operands = the six of `OPERANDS`, history = steps.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.operands import OPERANDS
from models.quantised_layer import QuantisedLinear

_HISTORY = 1024  # steps


class AmaxHistory:
    """The largest magnitude of each operand of each layer in each of the last 1024 steps.

    Layers without delayed scaling have rows of zeros. Where the largest of the history is 0, inf or
    NaN no scale can be made of it, and the one before is kept, as TransformerEngine does.

    The scale of a step is made of all 1024 steps before it: TransformerEngine takes the largest of
    its buffer before it rolls it and clears the slot of the step to come
    (`_default_get_amax_and_update_history` of transformer_engine/pytorch/quantization.py).
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
        for number, linear in enumerate(self.linears):
            if linear.delayed is not None:
                linear.delayed.seen.zero_()
                largest, kept = self.amax[number].amax(dim=-1), linear.delayed.amax
                kept.copy_(torch.where((largest > 0) & largest.isfinite(), largest, kept))
        self._slot = step % _HISTORY
        self.amax[..., self._slot].zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resume needs: the history, and the magnitudes of the scales."""
        self.record()
        kept = torch.zeros(len(self.linears), len(OPERANDS), device=self.amax.device)
        for row, linear in zip(kept, self.linears, strict=True):
            if linear.delayed is not None:
                row.copy_(linear.delayed.amax)
        return {"amax_history": self.amax, "amax_kept": kept}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`; before `amax_kept` was saved, scales were made of the history alone."""
        self.amax.copy_(state["amax_history"])
        largest = self.amax.amax(dim=-1)
        for row, linear in zip(state.get("amax_kept", largest), self.linears, strict=False):
            if linear.delayed is not None:
                linear.delayed.amax.copy_(row)
