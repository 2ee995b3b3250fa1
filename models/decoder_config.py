"""The shape of a decoder: GPT-2, Llama, what lies between them, and any other stack of branches.

Branches are named by letters (`models/branch_config.py`): `a` and `f` are known here, others are
given as `parts`.
"""

import math
from typing import TYPE_CHECKING, Any

from models.adapter_config import AdapterConfig
from models.attention_config import AttentionConfig
from models.branch_config import Activation, BranchConfig, Norm, Positions, Scheme, letters_by_layer
from models.config import any_config, any_configs, config, couples_samples, neutral
from models.flops import linear_flops, training_flops
from models.layers_config import FeedForwardConfig
from models.rope_config import RopeScaling
from models.rounding_config import RoundingConfig

if TYPE_CHECKING:
    from models.adapter import AdapterSizes
    from models.decoder import Decoder


@config
class DecoderConfig:
    """Shape and options of a decoder.

    Args:
        depth, width: number of layers; width of the residual stream.
        num_heads, num_kv_heads: query heads; key/value heads (None: as many).
        head_dim: width of a head (None: width / num_heads).
        hidden: feed-forward width (None: 4 x width, or for swiglu 8/3 x width to a multiple of 8).
        context_length: longest sequence; matters for learned positions only.
        norm: of the residual stream, before each branch and before the head.
        positions: rotary, or a learned embedding of each position.
        rope_base: base of the rotary angles.
        qk_norm: RMSNorm on queries and keys, head by head.
        activation: of the feed-forward branch; swiglu has a gate, a third matrix.
        bias: biases in the linear layers and in LayerNorm.
        tied: the head is the token embedding.
        dropout: probability, on the embedding and on the output of each branch.
        rope_scaling: stretches rotary positions beyond the context that they were trained at.
        norm_eps: added to the mean square or variance (None: 1e-6 for RMSNorm, 1e-5 for LayerNorm).
        softcap: logits become softcap * tanh(logits / softcap).
        z_loss: weight of logsumexp(logits)**2 in the training loss.
        init: scheme of the initial weights; `mup` scales them and the learning rates by width.
        init_std: standard deviation of the initial weights.
        base_width: with init=mup, the width at which learning rate and init_std were tuned.
        pattern: a word for each layer, repeated over the depth; a letter for each branch: `a`
            attention and `f` feed-forward, both shaped by the fields above, or a key of `parts`.
        parts: further branches by letter, each a config with its `_target_`: conf/model/part.
        streams: hyper-connections (several residual streams), a config with its `_target_`:
            conf/model/streams. None: the plain residual.
        neftune: alpha of NEFTune: uniform noise of alpha / sqrt(seq x width) on the embeddings in
            training; 5 is usual for fine-tuning on conversations, 0 is none.
        adapter: low-rank adapters on frozen weights, a config with its `_target_`:
            conf/model/adapter. None: all weights are trained.
        rounding: layers whose weights are rounded in training, a config with its `_target_`:
            conf/model/rounding. None: they compute as they are.
        causal: False lets every token see all others, as masked diffusion does; there is no
            decoding state then.
    """

    numerics = 2  # revision 1 drew biases from torch's global generator

    depth: int
    width: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    context_length: int = 1024
    norm: Norm = "rmsnorm"
    positions: Positions = "rope"
    rope_base: float = 10000.0
    qk_norm: bool = False
    activation: Activation = "swiglu"
    bias: bool = False
    tied: bool = True
    dropout: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0
    init: Scheme = "gpt2"
    init_std: float = 0.02
    base_width: int | None = None
    rope_scaling: RopeScaling | None = neutral(None)
    norm_eps: float | None = neutral(None)
    pattern: str = neutral("af")
    parts: dict[str, Any] = any_configs()
    streams: Any = any_config()
    causal: bool = neutral(True)
    neftune: float = neutral(0.0)
    adapter: Any = any_config()
    rounding: Any = any_config()

    def __post_init__(self) -> None:
        for name in ("depth", "width", "num_heads", "kv_heads", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"width={self.width} is not divisible by num_heads={self.num_heads}; "
                "change one, or give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.positions == "rope" and self.attention_dim % 2:
            raise ValueError(f"head_dim={self.attention_dim} must be even for positions=rope")
        if self.rope_scaling is not None and self.positions != "rope":
            raise ValueError(f"rope_scaling needs positions=rope, not {self.positions}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not 0.0 <= self.neftune < math.inf:
            raise ValueError(f"neftune={self.neftune} must not be negative or infinite")
        if (self.init == "mup") != (self.base_width is not None):
            raise ValueError("init=mup and base_width go together; give both or neither")
        for letter, part in self.parts.items():
            if len(letter) != 1 or not isinstance(part, BranchConfig):
                raise ValueError(
                    f"parts.{letter}={part!r} must be one letter and a config with its _target_; "
                    "see conf/model/part"
                )
        if self.streams is not None and not hasattr(self.streams, "build_ends"):
            raise ValueError(
                f"streams={self.streams!r} must be a config with its _target_; "
                "see conf/model/streams"
            )
        for word in letters_by_layer(self.pattern, self.depth):
            self._check_layer(word)
        if self.adapter is not None and not isinstance(self.adapter, AdapterConfig):
            raise ValueError(
                f"adapter={self.adapter!r} must be a config with its _target_; see "
                "conf/model/adapter"
            )
        if self.adapter is not None and self.regroups_tokens:
            raise ValueError("adapters on experts are not supported; use a model without them")
        self._check_rounding()

    def _check_rounding(self) -> None:
        if self.rounding is None:
            return
        if not isinstance(self.rounding, RoundingConfig):
            raise ValueError(
                f"rounding={self.rounding!r} must be a config with its _target_; see "
                "conf/model/rounding"
            )
        if self.adapter is not None or self.regroups_tokens:
            raise ValueError(
                "rounding and adapter, or experts, do not go together; leave one of them out"
            )

    def _check_layer(self, word: str) -> None:
        """Raise ValueError unless the letters of a layer are known and go together."""
        by_letter = self._branches_by_letter
        unknown = [letter for letter in word if letter not in by_letter]
        if unknown:
            raise ValueError(
                f"pattern={self.pattern!r}: {unknown[0]!r} is no part; "
                f"there are: {', '.join(by_letter)}"
            )
        names = [by_letter[letter].name for letter in word]
        if len(set(names)) < len(names):
            raise ValueError(
                f"pattern={self.pattern!r}: {word!r} has two branches of one kind "
                f"({', '.join(names)}); put them in layers of their own"
            )
        back = [letter for letter in word if by_letter[letter].looks_back]
        if back and not self.causal:
            raise ValueError(
                f"pattern={self.pattern!r}: {back[0]!r} looks back only; use it with causal=true"
            )

    @property
    def _branches_by_letter(self) -> dict[str, BranchConfig]:
        own: dict[str, BranchConfig] = {"a": AttentionConfig(), "f": FeedForwardConfig()}
        return own | self.parts

    def branches(self) -> list[list[BranchConfig]]:
        """Return the branches of each layer."""
        by_letter = self._branches_by_letter
        layers = letters_by_layer(self.pattern, self.depth)
        return [[by_letter[letter] for letter in word] for word in layers]

    def check_spans(self) -> None:
        """Raise ValueError unless every branch can let the tokens of a span see each other."""
        for word in letters_by_layer(self.pattern, self.depth):
            for letter in word:
                part = self._branches_by_letter[letter]
                if not getattr(part, "reads_spans", False):
                    raise ValueError(
                        f"pattern={self.pattern!r}: {letter!r} ({part.name}) reads from left to "
                        "right, and tokens of a prompt cannot see each other in it; use attention "
                        "over all tokens, or data.bidirectional_prompt=false"
                    )

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a branch makes a sample depend on the others of its forward pass."""
        return any(couples_samples(b, sequence_length) for row in self.branches() for b in row)

    @property
    def has_filters(self) -> bool:
        """Whether a branch has a depthwise convolution."""
        return any(getattr(part, "has_filters", False) for row in self.branches() for part in row)

    @property
    def regroups_tokens(self) -> bool:
        """Whether a branch takes tokens of several samples together, as experts do."""
        return any(
            getattr(part, "regroups_tokens", False) for row in self.branches() for part in row
        )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, the default resolved."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def attention_dim(self) -> int:
        """Width of one head, the default resolved."""
        return self.head_dim if self.head_dim is not None else self.width // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Feed-forward width, the default resolved."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.width // 3 // 8) * 8 if self.activation == "swiglu" else 4 * self.width

    @property
    def width_multiplier(self) -> float:
        """The muP multiplier m = width / base_width; 1 in standard parametrisation."""
        return 1.0 if self.base_width is None else self.width / self.base_width

    def build(self, vocab_size: int, seed: int) -> "Decoder":
        """Return the decoder, initialised; inside `torch.device("meta")` without values."""
        from models.decoder import Decoder  # noqa: PLC0415
        from models.initialise import filler, initialise  # noqa: PLC0415

        values: dict[str, Any] = {
            "scheme": self.init,
            "std": self.init_std,
            "depth": self.depth,
            "width_multiplier": self.width_multiplier,
            "seed": seed,
        }
        if self.adapter is None:
            model = Decoder(self, vocab_size)
            initialise(model, **values)
            return model if self.rounding is None else self._rounded(model)
        from models.adapter import adapt, without_weights  # noqa: PLC0415

        with without_weights():
            model = Decoder(self, vocab_size)
        initialise(model, **values)
        adapt(model, self.adapter, seed, filler(model, **values))
        return model

    def _rounded(self, model: "Decoder") -> "Decoder":
        from models.rounded_linear import round_linears  # noqa: PLC0415

        round_linears(model, self.rounding)
        return model

    def check(self, vocab_size: int, seq: int) -> None:
        """Raise ValueError if learned positions are fewer than `seq`."""
        if self.positions == "learned" and seq > self.context_length:
            raise ValueError(
                f"sequence_length={seq} exceeds context_length={self.context_length} of learned "
                "positions; lower train.sequence_length or raise model.context_length"
            )

    def num_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters, by formula."""
        head = 0 if self.tied else vocab_size * self.width
        embedding = vocab_size * self.width + self._num_positions
        own = embedding + head + self._norm_parameters + self._in_branches("num_parameters")
        adapters = 0 if self.adapter is None else self._adapter_sizes(vocab_size).parameters
        return own + adapters + self._num_steps(vocab_size)

    def num_trained_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters that are trained: with adapters theirs only."""
        if self.adapter is None:
            return self.num_parameters(vocab_size)
        return self._adapter_sizes(vocab_size).parameters

    def _adapter_sizes(self, vocab_size: int) -> "AdapterSizes":
        from models.adapter import adapter_sizes  # noqa: PLC0415

        return adapter_sizes(self, vocab_size)

    def _num_steps(self, vocab_size: int) -> int:
        """Return the number of steps that LSQ learns."""
        if self.rounding is None or self.rounding.weights != "lsq":
            return 0
        from models.rounded_linear import num_steps  # noqa: PLC0415

        return num_steps(self, vocab_size)

    def num_active_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters that one token is multiplied with.

        Of experts and lookup tables only the experts chosen and the rows read count.
        """
        idle = self._in_branches("num_parameters") - self._in_branches("num_active_parameters")
        return self.num_parameters(vocab_size) - idle

    def _in_branches(self, count: str) -> int:
        total = 0
        for number, part in enumerate(part for layer in self.branches() for part in layer):
            total += getattr(part, count)(self, number)
            total += self._norm_parameters if part.normed else 0
            total += self.streams.num_parameters(self) if self.streams is not None else 0
        return total

    @property
    def _norm_parameters(self) -> int:
        return self.width * (2 if self.norm == "layernorm" and self.bias else 1)

    @property
    def _num_positions(self) -> int:
        return self.context_length * self.width if self.positions == "learned" else 0

    def num_embedding_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters of learned positions and of an untied embedding."""
        return self._num_positions + (0 if self.tied else vocab_size * self.width)

    def forward_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return the forward FLOPs of one sequence: (all pairs, causal half of attention)."""
        head, layers = linear_flops(seq, self.width, vocab_size), self._layer_flops(seq)
        adapters = 0
        if self.adapter is not None:
            sizes = self._adapter_sizes(vocab_size)
            adapters = seq * sizes.for_token + sizes.for_pass
        full, causal = (head + adapters + sum(flops) for flops in zip(*layers, strict=True))
        return full, causal

    def training_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return the FLOPs of training on one sequence: (all pairs, causal half of attention).

        With adapters the layers below the first of them run forward only, and frozen matrices above
        have one product in the backward pass, not two.
        """
        full, causal = self.forward_flops_per_sequence(vocab_size, seq)
        if self.adapter is None:
            return training_flops(full), training_flops(causal)
        sizes = self._adapter_sizes(vocab_size)
        frozen = seq * sizes.frozen
        frozen += linear_flops(seq, self.width, vocab_size) if self.tied else 0
        layers = self._layer_flops(seq)[: sizes.lowest]
        below, below_causal = (sizes.for_pass + sum(layer[i] for layer in layers) for i in (0, 1))
        return (
            training_flops(full, frozen=frozen, apart=below),
            training_flops(causal, frozen=frozen, apart=below_causal),
        )

    def _layer_flops(self, seq: int) -> list[tuple[int, int]]:
        """Return the forward FLOPs of each layer without adapters, as of the whole model."""
        streams = self.streams.forward_flops(self, seq) if self.streams is not None else 0
        found = []
        for layer in self.branches():
            parts = [part.forward_flops(self, seq) for part in layer]
            full, causal = (sum(own) + streams * len(layer) for own in zip(*parts, strict=True))
            found.append((full, causal))
        return found
