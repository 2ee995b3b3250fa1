"""The config of heads that tell tokens further ahead (Medusa)."""

from typing import TYPE_CHECKING

from models.config import config
from models.decoder_config import DecoderConfig
from models.flops import linear_flops, training_flops

if TYPE_CHECKING:
    from models.medusa import Medusa


@config
class MedusaConfig:
    """A decoder that stays as it is, and heads on its last hidden state (arXiv 2401.10774).

    Args:
        trunk: the decoder, as the run of the input named trunk has it.
        num_heads: tokens that are told beyond the next one.
    """

    trunk: DecoderConfig
    num_heads: int = 3

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads} must be at least 1")

    def build(self, vocab_size: int, seed: int) -> "Medusa":
        """Return the model; its heads tell what the trunk does at first."""
        from models.medusa import Medusa  # noqa: PLC0415

        return Medusa(self, vocab_size, seed)

    def num_parameters(self, vocab_size: int) -> int:
        """Return the parameter count by formula, the trunk's included."""
        return self.trunk.num_parameters(vocab_size) + self.num_heads * self.trunk.width**2

    def training_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return the FLOPs of training the heads on one sequence: (all pairs, causal half).

        The trunk runs forward once. In the backward pass the frozen output matrix has one product,
        and so have the heads, whose input needs no gradient.
        """
        unembed = linear_flops(seq, self.trunk.width, vocab_size)
        own = self.num_heads * linear_flops(seq, self.trunk.width, self.trunk.width)
        once = own + self.num_heads * unembed
        full, causal = (
            training_flops(once + trunk - unembed, frozen=once, apart=trunk - unembed)
            for trunk in self.trunk.forward_flops_per_sequence(vocab_size, seq)
        )
        return full, causal
