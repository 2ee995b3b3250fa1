"""Rotary positions beyond the context that a model was trained at: linear, Llama 3, YaRN.

Shape legend: pairs = half the width of a head.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from models.rope_config import RopeScaling


def slowed(
    cfg: RopeScaling, inverse: Float[Tensor, " pairs"], base: float
) -> Float[Tensor, " pairs"]:
    """Return the stretched angle per position of each pair, in radians.

    Args:
        inverse: the angles before stretching, base^(-2i/dim).
        base: base of the rotary positions.
    """
    slow = inverse / cfg.factor
    if cfg.kind == "linear":
        return slow
    context = float(cfg.original_context or 0)
    if cfg.kind == "llama3":
        turns = context * inverse / (2 * math.pi)
        fast = ((turns - cfg.low_freq) / (cfg.high_freq - cfg.low_freq)).clamp(0.0, 1.0)
    else:
        fast = 1.0 - _ramp(cfg, len(inverse), base, context).to(inverse)
    return slow * (1.0 - fast) + inverse * fast


def _ramp(cfg: RopeScaling, pairs: int, base: float, context: float) -> Float[Tensor, " pairs"]:
    """Return YaRN's ramp: 0 for pairs that turn often, 1 for those that turn rarely."""
    low, high = (
        pairs * math.log(context / (turns * 2 * math.pi)) / math.log(base)
        for turns in (cfg.beta_fast, cfg.beta_slow)
    )
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, 2.0 * pairs - 1.0)
    if low == high:
        high += 0.001
    return ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
