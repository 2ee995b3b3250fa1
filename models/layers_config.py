"""The config of the feed-forward network, and its formulas."""

from typing import TYPE_CHECKING, ClassVar

from models.branch_config import Activation, Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.layers import FeedForward


@config
class FeedForwardConfig:
    """The decoder's feed-forward network, or one of another width.

    Args:
        hidden: its inner width (None: the decoder's).
    """

    name: ClassVar[str] = "mlp"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False
    reads_spans: ClassVar[bool] = True
    reads_side_by_side: ClassVar[bool] = True
    token_by_token: ClassVar[bool] = True

    hidden: int | None = None

    def build(self, host: Host, number: int, vocab_size: int) -> "FeedForward":
        """See `BranchConfig`."""
        from models.layers import FeedForward  # noqa: PLC0415

        return FeedForward(host.width, self._hidden(host), host.activation, bias=host.bias)

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return feed_forward_parameters(host.width, self._hidden(host), host.activation, host.bias)

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`."""
        flops = feed_forward_flops(seq, host.width, self._hidden(host), host.activation)
        return flops, flops

    def _hidden(self, host: Host) -> int:
        return host.hidden_dim if self.hidden is None else self.hidden


def feed_forward_parameters(dim: int, hidden: int, activation: Activation, bias: bool) -> int:
    """Return the number of parameters of a `FeedForward`."""
    up = hidden * (2 if activation == "swiglu" else 1)
    return dim * up + hidden * dim + int(bias) * (up + dim)


def feed_forward_flops(rows: int, dim: int, hidden: int, activation: Activation) -> int:
    """Return the forward FLOPs of `rows` vectors in a `FeedForward`."""
    up = hidden * (2 if activation == "swiglu" else 1)
    return linear_flops(rows, dim, up) + linear_flops(rows, hidden, dim)
