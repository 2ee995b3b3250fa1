"""The config of BDH; `models/bdh.py` has its equations."""

from typing import TYPE_CHECKING, Literal

from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.bdh import BDH

DROPOUT_PARTS = 8  # of the neurons, each with random bits of its own, so that chunks change none


@config
class BDHConfig:
    """Shape of a BDH.

    Args:
        depth: number of levels; all share one set of weights.
        width: of the residual stream.
        num_heads: heads that the neurons are divided into.
        multiplier: neurons of all heads together, in multiples of the width.
        dropout: probability, on the neurons.
        form: `repo` follows the public code, `paper` the paper's equations.
        rope_base: base of the rotary angles of a head's neurons, taken in neighbouring pairs.
        init_std: standard deviation of the initial weights.
        chunks: 1, 2, 4 or 8: compute the neurons in this many parts, and again in the backward
            pass, so that no activation as wide as all of them is kept (form=repo only).
    """

    depth: int = 6
    width: int = 256
    num_heads: int = 4
    multiplier: int = 128
    dropout: float = 0.1
    form: Literal["repo", "paper"] = "repo"
    rope_base: float = 65536.0
    init_std: float = 0.02
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.width * self.multiplier % (self.num_heads * 2 * DROPOUT_PARTS):
            raise ValueError(
                f"width={self.width} x multiplier={self.multiplier} neurons must divide into "
                f"num_heads={self.num_heads} heads of a multiple of {2 * DROPOUT_PARTS}"
            )
        if self.chunks not in (1, 2, 4, 8) or (self.chunks > 1 and self.form == "paper"):
            raise ValueError(f"chunks={self.chunks} must be 1, 2, 4 or 8, and 1 with form=paper")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def neurons(self) -> int:
        """Number of neurons of a head."""
        return self.width * self.multiplier // self.num_heads

    def build(self, vocab_size: int, seed: int) -> "BDH":
        """Return the model, initialised."""
        from models.bdh import BDH  # noqa: PLC0415
        from models.initialise import initialise  # noqa: PLC0415

        model = BDH(self, vocab_size)
        initialise(
            model,
            scheme="gpt2",
            std=self.init_std,
            depth=self.depth,
            width_multiplier=1.0,
            seed=seed,
        )
        return model

    def check(self, vocab_size: int, seq: int) -> None:
        """Accept any length."""

    def num_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters, by formula."""
        return 3 * self.num_heads * self.neurons * self.width + 2 * vocab_size * self.width

    def num_active_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters, all of which a token meets, at every level."""
        return self.num_parameters(vocab_size)

    def num_embedding_parameters(self, vocab_size: int) -> int:
        """Return the number of parameters of the token embedding."""
        return vocab_size * self.width

    def forward_flops_per_sequence(self, vocab_size: int, seq: int) -> tuple[int, int]:
        """Return the forward FLOPs of one sequence: (all pairs, causal half)."""
        wide = self.num_heads * self.neurons
        level = 3 * linear_flops(seq, self.width, wide)
        pairs = linear_flops(seq, wide, seq) + linear_flops(seq, seq, self.num_heads * self.width)
        head = linear_flops(seq, self.width, vocab_size)
        return self.depth * (level + pairs) + head, self.depth * (level + pairs // 2) + head
