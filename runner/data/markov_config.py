"""The config of Markov chain data; see `runner/data/markov.py`."""

from typing import TYPE_CHECKING, ClassVar

from models.config import config, execution
from runner.data.synthetic_config import Split, SyntheticConfig
from runner.data.tokenizers_config import TokenizerConfig

if TYPE_CHECKING:
    from runner.data.markov import MarkovSamples

_MAX_ENTRIES = {False: 1 << 24, True: 1 << 18}  # of the shared table; of each sequence's own


@config
class MarkovConfig(SyntheticConfig):
    """Sequences of a Markov chain, each of `train.sequence_length` tokens; needs tokenizer=symbols.

    No training sequence is repeated.

    Args:
        order: number of previous tokens that the next one depends on.
        concentration: of the Dirichlet distribution that the table's rows are drawn from; the
            smaller, the more certain the next token.
        in_context: draw a table for each sequence, not one for all.
        num_val: number of validation sequences.
        data_seed: of the table and of validation (the run's seed draws the training sequences).
        num_workers: processes that make samples beside the training process.
    """

    name: ClassVar[str] = "markov"

    order: int = 2
    concentration: float = 0.05
    in_context: bool = False
    num_val: int = 256
    data_seed: int = 0
    num_workers: int = execution(0)

    def __post_init__(self) -> None:
        for name in ("order", "num_val"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.concentration <= 0:
            raise ValueError(f"concentration={self.concentration} must be positive")

    def check(self, tokenizer: TokenizerConfig, seq: int) -> None:
        """Raise ValueError for a tokenizer of text or a table too large for memory."""
        super().check(tokenizer, seq)
        vocab = tokenizer.vocab_size or 0
        entries, limit = vocab ** (self.order + 1), _MAX_ENTRIES[self.in_context]
        if entries > limit:
            raise ValueError(
                f"tokenizer.vocab_size={vocab} at order={self.order} makes a table of "
                f"{entries:.1e} entries{' for each sequence' * self.in_context}, "
                f"more than {limit:.1e}; lower one"
            )

    def examples(self, vocab_size: int, seq: int, seed: int, split: Split) -> "MarkovSamples":
        """See `SyntheticConfig`."""
        from runner.data.markov import MarkovSamples  # noqa: PLC0415

        address = (seed, 1) if split == "train" else (self.data_seed, 2)
        return MarkovSamples(self, vocab_size, seq, address)
