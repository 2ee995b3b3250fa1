"""An evaluation: how large the weights are."""

from typing import Any

from models.config import config


@config
class NormsConfig:
    """The norm of all weights.

    Args:
        every: steps between two measurements (None: at the end only).
    """

    every: int | None = None

    def run(self, trained: Any, step: int) -> dict[str, float]:
        """Return `weight_norm`."""
        squares = sum(float(p.detach().square().sum()) for p in trained.model.parameters())
        return {"weight_norm": squares**0.5}
