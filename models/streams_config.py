"""The config of hyper-connections: several residual streams instead of one."""

from typing import TYPE_CHECKING, Literal

from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.streams import HyperConnection, Streams


@config
class StreamsConfig:
    """Residual streams around every branch.

    Args:
        kind: hc, unconstrained, or mhc, whose mixing is doubly stochastic; see `models/streams.py`.
        num_streams: number of residual streams.
        alpha: initial weight of the terms that depend on the token.
        iterations: rounds of Sinkhorn and Knopp's normalisation of columns, then rows (mhc).
    """

    kind: Literal["hc", "mhc"] = "mhc"
    num_streams: int = 4
    alpha: float = 0.01
    iterations: int = 20

    def __post_init__(self) -> None:
        for name in ("num_streams", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def build(self, host: Host, number: int) -> "HyperConnection":
        """Return the connection of branch `number`."""
        from models.streams import HyperConnection  # noqa: PLC0415

        return HyperConnection(self, host.width, number)

    def num_parameters(self, host: Host) -> int:
        """Return the number of parameters of one connection."""
        n = self.num_streams
        if self.kind == "hc":
            return host.width * (n + 2) + n * (n + 2) + 3
        return (n * host.width + 1) * n * (n + 2) + 3

    def forward_flops(self, host: Host, seq: int) -> int:
        """Return the forward FLOPs of one connection for one sequence."""
        n, width = self.num_streams, host.width
        if self.kind == "hc":
            gates = n * linear_flops(seq, width, n + 2)
        else:
            gates = linear_flops(seq, n * width, n * (n + 2))
        return gates + 2 * seq * n * width * (n + 1) + 2 * seq * n**3

    def build_ends(self) -> "Streams":
        """Return the two ends of the streams, before the first layer and after the last."""
        from models.streams import Streams  # noqa: PLC0415

        return Streams(self.num_streams)
