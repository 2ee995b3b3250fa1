"""The config of minGRU."""

from typing import TYPE_CHECKING, ClassVar

from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.min_gru import MinGRU


@config
class MinGRUConfig:
    """A minGRU layer.

    Args:
        expand: inner width in multiples of the model's width.
    """

    name: ClassVar[str] = "gru"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    expand: float = 1.0

    def inner(self, host: Host) -> int:
        """Return the inner width."""
        return max(1, round(self.expand * host.width))

    def build(self, host: Host, number: int, vocab_size: int) -> "MinGRU":
        """See `BranchConfig`."""
        from models.min_gru import MinGRU  # noqa: PLC0415

        return MinGRU(host.width, self.inner(host), number)

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return 3 * host.width * self.inner(host)

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`; the scan, elementwise, counts nothing."""
        flops = 3 * linear_flops(seq, host.width, self.inner(host))
        return flops, flops
