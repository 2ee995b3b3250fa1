"""The config of Mamba-2."""

from typing import TYPE_CHECKING, ClassVar

from kernels.recurrence_flops import recurrence_flops
from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.mamba import Mamba


@config
class MambaConfig:
    """A Mamba-2 layer.

    Args:
        state_dim: width n of the state.
        head_dim: width of a head (None: that of the decoder's heads).
        expand: inner width in multiples of the model's width.
        conv: taps of the short convolution.
        chunk: number of tokens computed at once in training.
    """

    name: ClassVar[str] = "mamba"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    has_filters: ClassVar[bool] = True

    state_dim: int = 64
    head_dim: int | None = None
    expand: int = 2
    conv: int = 4
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("state_dim", "head_dim", "expand", "conv", "chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def shape(self, host: Host) -> tuple[int, int]:
        """Return (inner width, heads)."""
        inner, head = self.expand * host.width, self.head_dim or host.attention_dim
        if inner % head:
            raise ValueError(f"head_dim={head} must divide expand x width = {inner}")
        return inner, inner // head

    def build(self, host: Host, number: int, vocab_size: int) -> "Mamba":
        """See `BranchConfig`."""
        from models.mamba import Mamba  # noqa: PLC0415

        return Mamba(self, host, number)

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        inner, heads = self.shape(host)
        mixed = inner + 2 * self.state_dim
        linears = host.width * (inner + mixed + heads) + inner * host.width
        return linears + (self.conv + 1) * mixed + 3 * heads + inner

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`; counted as chunks are computed, with all pairs of a chunk."""
        inner, heads = self.shape(host)
        flops = linear_flops(seq, host.width, 2 * inner + 2 * self.state_dim + heads)
        flops += linear_flops(seq, inner, host.width)
        flops += recurrence_flops(
            seq, heads, self.state_dim, inner // heads, chunk=self.chunk, delta=False, wide=False
        )
        return flops, flops
