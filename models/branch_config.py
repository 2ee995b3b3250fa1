"""The branches of a layer as data, named by the letters of a pattern.

    pattern "af"            attention, then feed-forward, in every layer
    pattern "df df af"      DeltaNet instead of attention in two layers of three (a word is a layer)

A branch adds branch(norm(x)) to the residual stream x. Its module is called as `models/branch.py`
says; this file needs no torch, so that configs are checked and counted without it.
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
    """The decoder around a branch, as far as its branches read it; see `DecoderConfig`."""

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
    def branches(self) -> "list[list[BranchConfig]]": ...


@runtime_checkable
class BranchConfig(Protocol):
    """The config of a branch: one file of conf/model/part.

    Args:
        name: prefix of its parameters in a layer: layers.3.NAME.weight.
        normed: it reads norm(x), by a norm of the decoder's kind; else x itself.
        looks_back: it is causal by construction, whatever the decoder's `causal` says.

    Optional:
        reads_spans: whether it lets the tokens of a span see each other (`Context.reach`), or
            mixes no tokens (default: no).
        reads_side_by_side: whether it knows `Context.parts`, or mixes no tokens (default: no).
        token_by_token: whether its output for a token hangs on its input for that token alone, so
            that it need not read tokens whose output nobody wants (default: no).
    """

    name: ClassVar[str]
    normed: ClassVar[bool]
    looks_back: ClassVar[bool]

    def build(self, host: Host, number: int, vocab_size: int) -> "nn.Module":
        """Return the branch: a module whose forward(x, context) returns its output.

        It may return (output, notes) instead; see `models/branch.py`.

        Args:
            number: its index among the branches of the whole decoder; its state is kept under it.
            vocab_size: size of buffers indexed by token id. What the ids stand for is handed to
                a method `read_vocabulary` of the module later, where it has one.
        """
        ...

    def num_parameters(self, host: Host, number: int) -> int:
        """Return the number of parameters of branch `number`, without the norm before it."""
        ...

    def num_active_parameters(self, host: Host, number: int) -> int:
        """Return how many of its parameters one token is multiplied with."""
        ...

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """Return the forward FLOPs of one sequence: (all pairs, causal half of attention)."""
        ...


def letters_by_layer(pattern: str, depth: int) -> list[str]:
    """Return the letters of each of `depth` layers: the words of `pattern`, over and over.

    Raises:
        ValueError: `pattern` has no word, or a letter twice in one word.
    """
    words = pattern.split()
    if not words:
        raise ValueError(f"pattern={pattern!r} has no layer; 'af' is attention and feed-forward")
    for word in words:
        if len(set(word)) < len(word):
            raise ValueError(
                f"pattern={pattern!r}: {word!r} has a letter twice; give the part a second letter"
            )
    return [words[index % len(words)] for index in range(depth)]
