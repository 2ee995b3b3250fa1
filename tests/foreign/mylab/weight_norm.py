"""An evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class WeightNormConfig:
    """The norm of all weights; `power` of the sum."""

    power: float = 2.0

    def run(self, trained: Any, step: int) -> Mapping[str, float]:
        """Return `weight_norm`."""
        total = sum(
            float(p.detach().abs().pow(self.power).sum()) for p in trained.model.parameters()
        )
        return {"weight_norm": total ** (1 / self.power)}
