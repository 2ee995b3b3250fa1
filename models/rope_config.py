"""The config of stretched rotary positions."""

import math
from typing import Literal

from models.config import config


@config
class RopeScaling:
    """Rotary positions stretched to a longer context: their angles grow more slowly.

    Args:
        kind: linear slows all pairs by `factor` (Chen et al., arXiv 2306.15595). llama3 slows the
            slow pairs, with a ramp between two wavelengths (Llama 3.1). yarn has a ramp over the
            pairs, and scales attention up (Peng et al., arXiv 2309.00071).
        factor: ratio of the new context to the original one.
        original_context: context before the stretching, in tokens (llama3, yarn).
        low_freq, high_freq: llama3: pairs with fewer turns than `low_freq` in the original context
            are slowed by the full factor, pairs with more than `high_freq` not at all.
        beta_fast, beta_slow: yarn: the same bounds, in turns.
        truncate: yarn: round the ends of the ramp outwards to whole pairs.
        gain: yarn: factor on queries and keys (None: 0.1 ln(factor) + 1).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_context: int | None = None
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    gain: float | None = None

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(f"rope_scaling.factor={self.factor} must be at least 1")
        if self.kind != "linear" and self.original_context is None:
            raise ValueError(f"rope_scaling.kind={self.kind} needs original_context")
        if self.kind == "llama3" and self.low_freq >= self.high_freq:
            raise ValueError(
                f"rope_scaling.low_freq={self.low_freq} must be below high_freq={self.high_freq}"
            )

    @property
    def attention_gain(self) -> float:
        """Factor on the cosine and sine tables, the default resolved."""
        if self.kind != "yarn":
            return 1.0
        return self.gain if self.gain is not None else 0.1 * math.log(self.factor) + 1.0
