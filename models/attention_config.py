"""The config of softmax attention: its heads, and the tokens that they see."""

from typing import TYPE_CHECKING, ClassVar, Literal

from models.branch_config import Host
from models.config import config, neutral
from models.flops import attention_flops, linear_flops

if TYPE_CHECKING:
    from models.attention import Attention

# What a decoding state may keep keys and values of all tokens in; see `models.stored_keys_values`.
Stored = Literal["int8", "fp8", "nvfp4", "int4", "int2"]


@config
class AttentionConfig:
    """Attention with the decoder's heads.

    Args:
        num_kv_heads: key/value heads (None: the decoder's).
        window: number of tokens that a query sees, itself included (None: all); the decoding state
            keeps no more.
        sinks: number of first tokens that it sees as well (StreamingLLM, arXiv 2309.17453).
        reindex: count the distance to a sink inside the cache, at most window + sinks - 1.
        learned_sink: a learned logit per head that takes attention away from all tokens (gpt-oss,
            arXiv 2508.10925).
        qkv_bias: biases on queries, keys and values alone, as Qwen2 has them; the decoder's `bias`
            puts one on the output too.
    """

    name: ClassVar[str] = "attn"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False
    reads_side_by_side: ClassVar[bool] = True

    num_kv_heads: int | None = None
    window: int | None = None
    sinks: int = 0
    reindex: bool = False
    learned_sink: bool = False
    qkv_bias: bool = neutral(False)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ValueError(
                f"sinks={self.sinks} must be at least 0, and needs a window; give window"
            )
        if self.reindex and (not self.sinks or self.learned_sink):
            raise ValueError(
                "reindex=true needs sinks that are tokens; give window and sinks, and leave "
                "learned_sink out"
            )

    @property
    def reads_spans(self) -> bool:
        """Whether the tokens of a span can see each other."""
        return self.window is None

    def kv_heads(self, host: Host) -> int:
        """Return the number of key/value heads in `host`."""
        return host.kv_heads if self.num_kv_heads is None else self.num_kv_heads

    def build(self, host: Host, number: int, vocab_size: int) -> "Attention":
        """See `BranchConfig`."""
        from models.attention import Attention  # noqa: PLC0415

        if host.num_heads % self.kv_heads(host):
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={host.num_heads}"
            )
        if self.reindex and host.positions != "rope":
            raise ValueError(f"reindex=true needs positions=rope, not {host.positions}")
        if self.window is not None and not host.causal:
            raise ValueError(f"window={self.window} looks back only; use it with causal=true")
        return Attention(self, host, number)

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        dim, bias = host.attention_dim, int(host.bias)
        q, kv = host.num_heads * dim, self.kv_heads(host) * dim
        inner = int(host.bias or self.qkv_bias) * (q + 2 * kv)
        linears = host.width * (q + 2 * kv) + q * host.width + inner + bias * host.width
        return linears + (2 * dim if host.qk_norm else 0) + host.num_heads * self.learned_sink

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`.

        A window saves nothing in training: all pairs are computed, then masked. With `reindex`
        queries and keys are twice as wide and keys twice as many: three times the products.
        """
        q, kv = host.num_heads * host.attention_dim, self.kv_heads(host) * host.attention_dim
        gemms = linear_flops(seq, host.width, q + 2 * kv) + linear_flops(seq, q, host.width)
        times = 3 if self.reindex else 1
        scores = times * attention_flops(seq, host.num_heads, host.attention_dim)
        return gemms + scores, gemms + (scores // 2 if host.causal else scores)
