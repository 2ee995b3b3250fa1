"""Running averages of the weights: exponential, or of the last copies."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from runner.learn.optim.average_config import AverageConfig


class WeightAverage:
    """One copy of the weights (ema) or `count` copies (last), in their dtype and sharding."""

    def __init__(self, cfg: AverageConfig, model: nn.Module) -> None:
        self.cfg, self.model = cfg, model
        self.copies: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after `step` (1-based)."""
        if self.cfg.kind == "ema" and self.copies:
            decay = min(self.cfg.decay, (1 + step) / (10 + step))
            for name, parameter in self._trained():
                self.copies[0][name].lerp_(parameter, 1.0 - decay)
        elif self.cfg.kind == "ema" or step % self.cfg.every == 0:
            current = {n: p.detach().clone() for n, p in self._trained()}
            self.copies = [*self.copies, current][-self.cfg.count :]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """Return all copies as `<age>/<parameter>`, oldest first."""
        return {f"{i}/{n}": t for i, copy in enumerate(self.copies) for n, t in copy.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the copies from the result of `tensors`."""
        self.copies = []
        for key in sorted(tensors, key=lambda k: int(k.partition("/")[0])):
            age, _, name = key.partition("/")
            if int(age) == len(self.copies):
                self.copies.append({})
            self.copies[-1][name] = tensors[key]

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights inside the context."""
        own = {n: p.detach().clone() for n, p in self._trained()}
        for name, parameter in self._trained():
            parameter.copy_(mean([copy[name] for copy in self.copies]))
        try:
            yield
        finally:
            for name, parameter in self._trained():
                parameter.copy_(own[name])


def mean(tensors: list[Tensor]) -> Tensor:
    """Return the element-wise mean, summed oldest first."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total / len(tensors)
