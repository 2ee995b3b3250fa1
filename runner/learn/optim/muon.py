"""Muon (Jordan et al., 2024): orthogonalised momentum, for matrices."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from kernels.newton_schulz import orthogonalize


class Muon(torch.optim.Optimizer):
    """w -= lr * (0.2 sqrt(max(rows, cols)) * orthogonal(nesterov momentum) + decay * w)."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                blend = parameter.grad.lerp(state["momentum"], group["momentum"])
                update = _orthogonal(blend) * (0.2 * max(parameter.shape) ** 0.5)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonalised matrix; a sharded one (FSDP2) is gathered, then sharded again."""
    if isinstance(matrix, DTensor):
        full = orthogonalize(matrix.full_tensor()).to(matrix.dtype)
        return distribute_tensor(full, matrix.device_mesh, matrix.placements)
    return orthogonalize(matrix).to(matrix.dtype)
