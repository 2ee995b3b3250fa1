"""What a layer is made of, as data: parts that read the residual stream and add to it, named by letters of a pattern.

    pattern "af"            attention, then feed-forward, in every layer
    pattern "df df af"      DeltaNet instead of attention in two layers of three (a word is a layer)

A part computes x + branch(norm(x)); `PartConfig` is its config, `Host` what it may read of the decoder around it.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu", "relu2"]
Positions = Literal["rope", "learned"]
Scheme = Literal["gpt2", "depth_scaled", "mup"]  # of initial weights, see `models/initialise.py`


@runtime_checkable
class Host(Protocol):
    """What parts read of the decoder that they are built into; see `DecoderConfig` for what each means."""

    @property
    def width(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def attention_dim(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def bias(self) -> bool: ...
    @property
    def norm_eps(self) -> float | None: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def positions(self) -> Positions: ...
    @property
    def init(self) -> Scheme: ...
    @property
    def causal(self) -> bool: ...
    def branches(self) -> "list[list[PartConfig]]": ...


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

    def build(self, host: Host, number: int, vocab_size: int) -> "nn.Module":
        """Return the branch; forward(x, context) gives its output, or (output, notes): see `models/branch.py`.

        `number` counts the branches of the whole decoder; a branch keeps its state under it. Buffers of the size of
        the vocabulary are made here; what its ids say, `LanguageModel.read_vocabulary` tells.
        """
        ...

    def num_parameters(self, host: Host, number: int) -> int:
        """Return the number of parameters of branch `number`, the norm before it not counted."""
        ...

    def num_active_parameters(self, host: Host, number: int) -> int:
        """Return how many of them one token is multiplied with."""
        ...

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
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
            raise ValueError(
                f"pattern={pattern!r}: {word!r} has a letter twice; give the part a second letter"
            )
    return [given[index % len(given)] for index in range(depth)]
