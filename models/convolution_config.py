"""The config of a gated convolution."""

from typing import TYPE_CHECKING, ClassVar

from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.convolution import Convolution


@config
class ConvolutionConfig:
    """A gated convolution.

    Args:
        taps: length of its filters, the token itself included.
    """

    name: ClassVar[str] = "conv"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True
    has_filters: ClassVar[bool] = True

    taps: int = 3

    def __post_init__(self) -> None:
        if self.taps < 1:
            raise ValueError(f"taps={self.taps} must be at least 1")

    def build(self, host: Host, number: int, vocab_size: int) -> "Convolution":
        """See `BranchConfig`."""
        from models.convolution import Convolution  # noqa: PLC0415

        return Convolution(host.width, self.taps, number)

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return host.width * (2 * host.width + self.taps + 2)

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`; the convolution itself counts nothing."""
        flops = 2 * linear_flops(seq, host.width, host.width)
        return flops, flops
