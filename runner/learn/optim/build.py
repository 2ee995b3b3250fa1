"""Optimisers of anybody's config."""

from typing import Any

import torch


def build_optimizers(cfg: Any, model: Any) -> list[torch.optim.Optimizer]:
    """Return what the config builds, one optimiser or several; the schedule multiplies `base_lr`, by default lr."""
    built = cfg.build(model)
    optimizers = list(built) if isinstance(built, (list, tuple)) else [built]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
    return optimizers
