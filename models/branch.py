"""What a branch of a layer is handed beside its input, and what it may say beside its output; see `models/part.py`.

Shape legend: batch, seq.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from kernels.philox import NoiseKey
from models.cache import DecoderState

Tables = tuple[Tensor, Tensor]  # cos and sin
# What a branch has to say beside its output: `loss.NAME`, a mean to add to the training loss, or a figure for the log.
Notes = dict[str, Tensor]


@dataclass
class Context:
    """What a branch may know of a forward pass beside its input.

    Args:
        tokens: ids read. positions: of them, from 0. documents: of each token (None: all are one).
        rotary: tables of the positions, for q and k; rotary_at: those of other positions.
        state: what was read before, where the pass continues a text.
        mixing: of residual streams, the product of all mixing matrices so far; see `models/streams.py`.
    """

    tokens: Int64[Tensor, "batch seq"]
    positions: Int64[Tensor, "*batch seq"]
    documents: Int64[Tensor, "batch seq"] | None = None
    rotary: Tables | None = None
    rotary_at: Callable[[Tensor], Tables] | None = None
    noise: NoiseKey | None = None
    state: DecoderState | None = None
    mixing: Tensor | None = None


def split_notes(out: Any) -> tuple[Tensor, Notes]:
    """Return (output, notes) of what a branch returned."""
    return out if isinstance(out, tuple) else (out, {})
