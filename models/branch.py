"""What a layer is made of: branches that read the residual stream and add to it, named by letters of a pattern.

    pattern "af"            attention, then feed-forward, in every layer
    pattern "df df af"      DeltaNet instead of attention in two layers of three (a word is a layer)

Each branch computes x + branch(norm(x)). Its config is a part of the decoder's (`DecoderConfig.parts`).

Shape legend: batch, seq, dim = model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor, nn

from kernels.philox import NoiseKey
from models.cache import DecoderState

if TYPE_CHECKING:
    from models.decoder import DecoderConfig

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


@runtime_checkable
class PartConfig(Protocol):
    """The config of a branch.

    Args:
        name: of its parameters in a layer: layers.3.NAME.weight.
        normed: it reads norm(x), by a norm of the decoder's kind; else x itself.
        looks_back: it sees earlier tokens and no later ones, whatever the decoder's `causal` says.
    """

    name: ClassVar[str]
    normed: ClassVar[bool]
    looks_back: ClassVar[bool]

    def build(self, host: "DecoderConfig", number: int, vocab_size: int) -> nn.Module:
        """Return the branch; forward(x, context) gives its output, or (output, notes).

        `number` counts the branches of the whole decoder; a branch keeps its state under it. Buffers of the size of
        the vocabulary are made here; what its ids say, `LanguageModel.read_vocabulary` tells.
        """
        ...

    def num_parameters(self, host: "DecoderConfig", number: int) -> int:
        """Return the number of parameters of branch `number`, the norm before it not counted."""
        ...

    def num_active_parameters(self, host: "DecoderConfig", number: int) -> int:
        """Return how many of them one token is multiplied with."""
        ...

    def forward_flops(self, host: "DecoderConfig", seq: int) -> tuple[int, int]:
        """Return forward FLOPs of one sequence: (as computed, causal half of attention counted)."""
        ...


def words(pattern: str, depth: int) -> list[str]:
    """Return the letters of each layer: the words of `pattern`, over and over.

    Raises:
        ValueError: no word, or a letter twice in one.
    """
    given = pattern.split()
    if not given:
        raise ValueError(f"pattern={pattern!r} has no layer; 'af' is attention and feed-forward")
    for word in given:
        if len(set(word)) < len(word):
            raise ValueError(f"pattern={pattern!r}: {word!r} has a letter twice; give the part a second letter")  # fmt: skip
    return [given[index % len(given)] for index in range(depth)]


def split_notes(out: Any) -> tuple[Tensor, Notes]:
    """Return (output, notes) of what a branch returned."""
    return out if isinstance(out, tuple) else (out, {})
