"""The config of linear attention; `models/linear_attention.py` has its equations."""

from typing import TYPE_CHECKING, ClassVar, Literal

from kernels.recurrence_flops import recurrence_flops
from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.linear_attention import LinearAttention

LOW_RANK = 16  # rank of GLA's gate


@config
class LinearAttentionConfig:
    """Attention with a state of [heads, key width, value width].

    Args:
        kind: the rule by which the state is updated; see `models/linear_attention.py`.
        num_heads: None: the decoder's.
        key_dim: width of a head's keys (None: that of the decoder's heads). For `based` take 8 to
            24, which its features turn into 1 + d + d^2. Values have width / num_heads.
        conv: taps of a short convolution on q, k and v (0: none).
        chunk: number of tokens computed at once in training.
    """

    name: ClassVar[str] = "linear"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    has_filters: ClassVar[bool] = True

    kind: Literal["gla", "delta", "gated_delta", "based"] = "gated_delta"
    num_heads: int | None = None
    key_dim: int | None = None
    conv: int = 4
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("num_heads", "key_dim", "chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def shape(self, host: Host) -> tuple[int, int, int]:
        """Return (heads, key width, value width)."""
        heads = self.num_heads or host.num_heads
        if host.width % heads:
            raise ValueError(f"num_heads={heads} must divide width={host.width}")
        return heads, self.key_dim or host.attention_dim, host.width // heads

    def widths(self, host: Host) -> dict[str, int]:
        """Return the widths of the parts of the input projection, by name."""
        heads, k, v = self.shape(host)
        parts = {"q": heads * k, "k": heads * k, "v": heads * v}
        if self.kind != "based":
            parts["gate"] = heads * v
        if self.kind == "gla":
            parts["low"] = LOW_RANK
        if self.kind in ("delta", "gated_delta"):
            parts["beta"] = heads
        if self.kind == "gated_delta":
            parts["fade"] = heads
        return parts

    def build(self, host: Host, number: int, vocab_size: int) -> "LinearAttention":
        """See `BranchConfig`."""
        from models.linear_attention import LinearAttention  # noqa: PLC0415

        return LinearAttention(self, host, number)

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        heads, k, v = self.shape(host)
        shared = host.width * (sum(self.widths(host).values()) + heads * v)
        shared += self.conv * heads * (2 * k + v) + (0 if self.kind == "based" else v)
        own = {"gla": heads * k * (LOW_RANK + 1), "gated_delta": 2 * heads}
        return shared + own.get(self.kind, 0)

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`; counted as chunks are computed, with all pairs of a chunk."""
        heads, k, v = self.shape(host)
        flops = linear_flops(seq, host.width, sum(self.widths(host).values()))
        flops += linear_flops(seq, heads * v, host.width)
        flops += linear_flops(seq, LOW_RANK, heads * k) if self.kind == "gla" else 0
        if self.kind == "based":
            k, v = 1 + k + k * k, v + 1
        flops += recurrence_flops(
            seq, heads, k, v, chunk=self.chunk, delta="delta" in self.kind, wide=self.kind == "gla"
        )
        return flops, flops
