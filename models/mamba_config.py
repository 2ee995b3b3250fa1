"""Mamba-2 as data."""

from typing import TYPE_CHECKING, ClassVar

from kernels.recurrence_flops import recurrence_flops
from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.mamba import Mamba


@config
class MambaConfig:
    """A Mamba-2 mixer.

    Args:
        state_dim: n. head_dim: width of a head (None: of the decoder's heads). expand: inner width over the model's. conv: taps.
        chunk: tokens computed at once.
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
        return (
            host.width * (2 * inner + 2 * self.state_dim + heads)
            + (self.conv + 1) * mixed
            + 3 * heads
            + inner
            + inner * host.width
        )

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`; as chunks are computed, all pairs of a chunk."""
        inner, heads = self.shape(host)
        found = linear_flops(seq, host.width, 2 * inner + 2 * self.state_dim + heads)
        found += linear_flops(seq, inner, host.width)
        found += recurrence_flops(
            seq, heads, self.state_dim, inner // heads, chunk=self.chunk, delta=False, wide=False
        )
        return found, found
