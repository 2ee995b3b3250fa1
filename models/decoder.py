"""The decoder-only transformer: GPT-2, Llama and what lies between, by config.

Pre-norm blocks x + attn(norm(x)), x + mlp(norm(x)); a final norm; a linear head, tied or not.

Shape legend: batch, seq, dim = width, vocab.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from kernels.packed import can_pack
from kernels.philox import NoiseKey, dropout
from kernels.rotary import rotary_frequencies, rotary_tables
from models.cache import KVCache, State
from models.config import config, neutral
from models.flops import attention_flops, linear_flops
from models.initialise import Scheme, initialise
from models.language_model import LanguageModel, TokenLoss
from models.layers import (
    Activation,
    Attention,
    FeedForward,
    Norm,
    PackedLinear,
    make_norm,
    pack_linears,
)
from models.rope import RopeScaling


@config
class DecoderConfig:
    """Shape and options of a decoder.

    Args:
        depth, width: layers and residual width.
        num_heads, num_kv_heads: query heads and key/value heads (None: as many).
        head_dim: width of a head (None: width / num_heads).
        hidden: feed-forward width (None: 4 x width, or for swiglu 8/3 x width to a multiple of 8).
        context_length: longest sequence; matters for learned positions only.
        dropout: on the embedding and on what each branch adds to the residual stream.
        rope_scaling: stretches rotary positions past the context they were trained at.
        norm_eps: added to the mean square or variance (None: 1e-6 of RMSNorm, 1e-5 of LayerNorm).
        softcap: logits become softcap * tanh(logits / softcap).
        z_loss: weight of logsumexp(logits)**2 in the training loss.
        base_width: muP: the width at which learning rate and std were tuned (init=mup only).
    """

    numerics = 2  # 1 left biases at torch's default, drawn from the global generator

    depth: int
    width: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    context_length: int = 1024
    norm: Norm = "rmsnorm"
    positions: Literal["rope", "learned"] = "rope"
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
        if (self.init == "mup") != (self.base_width is not None):
            raise ValueError("init=mup and base_width go together; give both or neither")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the default resolved."""
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
        """Return the initialised decoder (on the meta device inside `torch.device('meta')`)."""
        model = Decoder(self, vocab_size)
        initialise(
            model, scheme=self.init, std=self.init_std, depth=self.depth,
            width_multiplier=self.width_multiplier, seed=seed,
        )  # fmt: skip
        return model

    def check(self, vocab_size: int, seq: int) -> None:
        """Raise ValueError where learned positions end before the sequence does."""
        if self.positions == "learned" and seq > self.context_length:
            raise ValueError(
                f"sequence_length={seq} exceeds context_length={self.context_length} of learned "
                "positions; lower train.sequence_length or raise model.context_length"
            )

    def num_parameters(self, vocab_size: int) -> int:
        """Return the parameter count by formula (a test holds it equal to numel)."""
        q, kv = self.num_heads * self.attention_dim, self.kv_heads * self.attention_dim
        bias = int(self.bias)
        norm = self.width * (2 if self.norm == "layernorm" and self.bias else 1)
        attn = self.width * (q + 2 * kv) + q * self.width + bias * (q + 2 * kv + self.width)
        attn += 2 * self.attention_dim if self.qk_norm else 0
        up = self.hidden_dim * (2 if self.activation == "swiglu" else 1)
        mlp = self.width * up + self.hidden_dim * self.width + bias * (up + self.width)
        head = 0 if self.tied else vocab_size * self.width
        positions = self.context_length * self.width if self.positions == "learned" else 0
        embedding = vocab_size * self.width + positions
        return self.depth * (attn + mlp + 2 * norm) + norm + embedding + head

    def num_embedding_parameters(self, vocab_size: int) -> int:
        """Return lookup-only parameters: positions, and token embeddings unless tied to the head."""
        positions = self.context_length * self.width if self.positions == "learned" else 0
        return positions + (0 if self.tied else vocab_size * self.width)

    def forward_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return forward FLOPs of one sequence: (all pairs, causal half)."""
        q, kv = self.num_heads * self.attention_dim, self.kv_heads * self.attention_dim
        up = self.hidden_dim * (2 if self.activation == "swiglu" else 1)
        layer = (
            linear_flops(seq, self.width, q + 2 * kv)
            + linear_flops(seq, q, self.width)
            + linear_flops(seq, self.width, up)
            + linear_flops(seq, self.hidden_dim, self.width)
        )
        scores = attention_flops(seq, self.num_heads, self.attention_dim)
        gemms = self.depth * layer + linear_flops(seq, self.width, vocab_size)
        return gemms + self.depth * scores, gemms + self.depth * scores // 2


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added after."""

    def __init__(self, cfg: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index, self.drop = index, cfg.dropout
        # muP scales scores by 1/dim instead of 1/sqrt(dim), equal at head width 64.
        dim = cfg.attention_dim
        scale = 8.0 / dim if cfg.init == "mup" else dim**-0.5
        self.attn_norm = make_norm(cfg.norm, cfg.width, cfg.bias, cfg.norm_eps)
        self.attn = Attention(
            cfg.width, cfg.num_heads, cfg.kv_heads, dim, bias=cfg.bias, qk_norm=cfg.qk_norm,
            scale=scale, norm_eps=cfg.norm_eps,
        )  # fmt: skip
        self.mlp_norm = make_norm(cfg.norm, cfg.width, cfg.bias, cfg.norm_eps)
        self.mlp = FeedForward(cfg.width, cfg.hidden_dim, cfg.activation, bias=cfg.bias)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rotary: tuple[Tensor, Tensor] | None,
        documents: Int64[Tensor, "batch seq"] | None,
        noise: NoiseKey | None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        kept = None if cache is None else (cache, self.index)
        attn = self.attn(self.attn_norm(x), rotary, documents, kept)
        x = x + dropout(attn, self.drop, noise, 2 * self.index + 1)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.drop, noise, 2 * self.index + 2)


class Decoder(LanguageModel):
    """See `DecoderConfig`."""

    cfg: DecoderConfig

    def __init__(self, cfg: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embedding = nn.Embedding(vocab_size, cfg.width)
        learned = cfg.positions == "learned"
        self.positions = nn.Embedding(cfg.context_length, cfg.width) if learned else None
        self.layers = nn.ModuleList(Block(cfg, index) for index in range(cfg.depth))
        self.norm = make_norm(cfg.norm, cfg.width, cfg.bias, cfg.norm_eps)
        self.head = None if cfg.tied else nn.Linear(cfg.width, vocab_size, bias=False)
        self.packed_head: PackedLinear | None = None

    def forward(
        self,
        tokens: Int64[Tensor, "batch seq"],
        targets: Int64[Tensor, "batch seq"] | None = None,
        *,
        documents: Int64[Tensor, "batch seq"] | None = None,
        noise: NoiseKey | None = None,
        state: State | None = None,
        counts: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"] | Float[Tensor, "batch vocab"] | TokenLoss:
        if state is None:
            hidden = self.hidden_states(tokens, documents, noise)
        else:
            hidden = self._read(tokens, state, counts)
        if targets is None:
            return self._logits(hidden)
        scale = 1.0 / self.cfg.width_multiplier
        weight = self.embedding.weight if self.head is None else self.head.weight
        total, nll = linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), scale=scale,
            softcap=self.cfg.softcap, z_loss=self.cfg.z_loss,
        )  # fmt: skip
        return TokenLoss(total=total, nll=nll.view(targets.shape))

    def _logits(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        if self.packed_head is not None:
            product = self.packed_head(hidden)
        else:
            weight = self.embedding.weight if self.head is None else self.head.weight
            product = hidden @ weight.to(hidden.dtype).T
        logits = product.float() * (1.0 / self.cfg.width_multiplier)
        cap = self.cfg.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembed(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows vocab"]:
        """See `LanguageModel.unembed`."""
        return self._logits(self.norm(x))

    def for_inference(self) -> "Decoder":
        """See `LanguageModel.for_inference`."""
        head = self.embedding.weight if self.head is None else self.head.weight
        pack_linears(self.layers)
        self.packed_head = PackedLinear(head, None) if can_pack(head) else None
        return self

    def hidden_states(
        self,
        tokens: Int64[Tensor, "batch seq"],
        documents: Int64[Tensor, "batch seq"] | None = None,
        noise: NoiseKey | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Return the normed last hidden state, which the head reads."""
        seq = tokens.shape[1]
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[:seq]
        x = _autocast(x)
        rotary = self._rotary(torch.arange(seq, device=x.device))
        x = dropout(x, self.cfg.dropout, noise, 0)
        for layer in self.layers:
            x = layer(x, rotary, documents, noise)
        return self.norm(x)  # type: ignore[no-any-return]

    def _rotary(self, positions: Int64[Tensor, "... seq"]) -> tuple[Tensor, Tensor] | None:
        cfg = self.cfg
        if cfg.positions != "rope":
            return None
        found = rotary_frequencies(cfg.attention_dim, cfg.rope_base, positions.device)
        if cfg.rope_scaling is None:
            return rotary_tables(positions, found)
        slowed = cfg.rope_scaling.slow(found, cfg.rope_base)
        return rotary_tables(positions, slowed, cfg.rope_scaling.attention_gain)

    def start(self, batch: int, capacity: int, *, static: bool = False) -> KVCache:
        """See `LanguageModel.start`."""
        device = self.embedding.weight.device
        return KVCache(batch, capacity=capacity, device=device, static=static)

    def _read(
        self, tokens: Int64[Tensor, "batch seq"], state: State, counts: Int64[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch dim"]:  # fmt: skip
        """Read tokens into the cache; return the hidden state after the last of each row."""
        assert isinstance(state, KVCache)
        positions = state.begin(tokens.shape[1])
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        x = _autocast(x)
        rotary = self._rotary(positions[:, None])  # the same for every head
        for layer in self.layers:
            x = layer(x, rotary, None, None, state)
        last = x[torch.arange(len(x), device=x.device), state.end(counts) - 1]
        return self.norm(last)  # type: ignore[no-any-return]

    def blocks(self) -> list[nn.Module]:
        """Return the layers in order."""
        return list(self.layers)

    def learning_rate_scales(self) -> dict[str, float]:
        """Return 1/m for hidden matrices under muP with Adam (Yang et al., table 8)."""
        if self.cfg.init != "mup":
            return {}
        names = (n for n, p in self.layers.named_parameters(prefix="layers") if p.ndim >= 2)
        return dict.fromkeys(names, 1.0 / self.cfg.width_multiplier)


def _autocast(x: Tensor) -> Tensor:
    """Return `x` in the type that autocast, where it is on, computes in."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
