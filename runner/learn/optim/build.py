"""Optimisers from a config of any class."""

from typing import Any

import torch


def build_optimizers(cfg: Any, model: Any) -> list[torch.optim.Optimizer]:
    """Return the optimisers of `cfg` as a list.

    Each parameter group has a `base_lr`, which the schedule multiplies; by default it is the lr.
    """
    built = cfg.build(model)
    optimizers = list(built) if isinstance(built, (list, tuple)) else [built]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
    return optimizers
