"""What the module of a branch takes and returns: forward(x, context) -> output or (output, notes).

Its config, which needs no torch, is a `BranchConfig` (`models/branch_config.py`).

Shape legend: batch, seq.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int64
from torch import Tensor

from kernels.philox import NoiseKey
from models.cache import DecoderState
from models.canvas import Canvas

Tables = tuple[Tensor, Tensor]  # cos and sin
# Scalars by name: `loss.NAME`, a mean over tokens, is added to the training loss; all are logged.
Notes = dict[str, Tensor]


@dataclass
class Context:
    """A forward pass, as far as a branch may know it beside its input.

    Args:
        tokens: the ids.
        positions: of each token, from 0.
        documents: index of each token's document (None: all tokens are of one).
        reach: index of the last token that each sees (None: itself); see `span_reach`.
        rotary: tables that turn q and k, at `positions` (None: no rotary positions).
        rotary_at: returns the tables at other positions.
        noise: key of dropout's random bits (None: no dropout).
        state: memory of earlier tokens, where the pass continues a text.
        canvas: keys and values of the rest of texts of which the pass reads a part.
        visible: visible[i, j] says whether token i sees token j of its document (None: as `causal`
            of the model says).
        parts: forward passes that this one makes together, their texts one after the other along
            `seq`; only branches with `reads_side_by_side` know them.
        mixing: product of the mixing matrices so far, with several residual streams; see
            `models/streams.py`.
    """

    tokens: Int64[Tensor, "batch seq"]
    positions: Int64[Tensor, "*batch seq"]
    documents: Int64[Tensor, "batch seq"] | None = None
    reach: Int64[Tensor, "batch seq"] | None = None
    rotary: Tables | None = None
    rotary_at: Callable[[Tensor], Tables] | None = None
    noise: NoiseKey | None = None
    state: DecoderState | None = None
    canvas: Canvas | None = None
    visible: Bool[Tensor, "seq seq"] | None = None
    parts: "tuple[Context, ...]" = ()
    mixing: Tensor | None = None


def split_notes(returned: Any) -> tuple[Tensor, Notes]:
    """Return (output, notes) of what a branch returned."""
    return returned if isinstance(returned, tuple) else (returned, {})
