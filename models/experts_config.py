"""The config of a mixture of experts."""

from typing import TYPE_CHECKING, ClassVar, Literal

from models.branch_config import Host
from models.config import config
from models.flops import linear_flops
from models.layers_config import feed_forward_flops, feed_forward_parameters

if TYPE_CHECKING:
    from models.experts import Experts


@config
class ExpertsConfig:
    """A mixture of experts in the place of the feed-forward network.

    Args:
        top_k: experts of each token.
        hidden: width of an expert (None: the decoder's).
        shared: number of experts that every token goes to, with weight 1.
        softmax: over all scores, `before` the choice, or over those of the chosen, `after` it.
        normalise: with softmax=before, make the weights of a token's experts sum to 1.
        capacity_factor: in training an expert takes at most this times an equal share of a
            micro-batch's tokens, the first ones, and drops the rest (None: none are dropped).
            Evaluation drops none.
        num_experts: number of experts, of which each token is sent to `top_k`.
        balance: `loss`: num_experts * sum over experts of (share of tokens * mean probability),
            times `balance_weight`. `bias`: a bias on an expert's probability, for the choice only,
            which the optimiser moves against overload (Wang et al., arXiv 2408.15664, move it by
            the sign of the overload). `none`.
        balance_weight: weight of the loss, or rate of the biases.
        z_loss: weight of the mean of logsumexp(scores)^2 (ST-MoE, arXiv 2202.08906).
    """

    name: ClassVar[str] = "moe"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False
    reads_spans: ClassVar[bool] = True
    regroups_tokens: ClassVar[bool] = True

    num_experts: int
    top_k: int = 2
    hidden: int | None = None
    shared: int = 0
    softmax: Literal["before", "after"] = "before"
    normalise: bool = True
    capacity_factor: float | None = None
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_weight: float = 0.01
    z_loss: float = 1e-3

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be positive; null drops no token"
            )

    def couples_samples(self, sequence_length: int) -> bool:
        """Return whether a sample's loss or gradient depends on the others of its micro-batch."""
        return self.balance != "none" or self.capacity_factor is not None

    def build(self, host: Host, number: int, vocab_size: int) -> "Experts":
        """See `BranchConfig`."""
        from models.experts import Experts  # noqa: PLC0415

        return Experts(self, host)

    def width(self, host: Host) -> int:
        """Return the hidden width of an expert."""
        return host.hidden_dim if self.hidden is None else self.hidden

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self._parameters(host, self.num_experts)

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return self._parameters(host, self.top_k)

    def _parameters(self, host: Host, experts: int) -> int:
        one = feed_forward_parameters(host.width, self.width(host), host.activation, host.bias)
        wide = feed_forward_parameters(
            host.width, self.shared * self.width(host), host.activation, host.bias
        )
        router = self.num_experts * (host.width + (self.balance == "bias"))
        return experts * one + router + (wide if self.shared else 0)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`; counted as if no token was dropped."""
        flops = linear_flops(seq, host.width, self.num_experts)
        for hidden in (self.top_k * self.width(host), self.shared * self.width(host)):
            flops += feed_forward_flops(seq, host.width, hidden, host.activation)
        return flops, flops
