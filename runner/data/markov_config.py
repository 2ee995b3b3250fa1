"""A Markov chain as data, its config; `runner/data/markov.py` says what it is good for."""

from typing import TYPE_CHECKING, ClassVar

from models.config import config, execution
from runner.data.synthetic_config import Split, SyntheticConfig
from runner.data.tokenizers_config import TokenizerConfig

if TYPE_CHECKING:
    from runner.data.markov import MarkovSamples

_MOST_ENTRIES = {False: 1 << 24, True: 1 << 18}  # of the table, of that of each sequence


@config
class MarkovConfig(SyntheticConfig):
    """Sequences of a chain, each of `train.sequence_length` tokens and never seen twice; goes with tokenizer=symbols.

    Args:
        order: tokens that the next one depends on.
        concentration: of the Dirichlet distribution that each row of the table is drawn from: small is certain.
        in_context: draw a table for each sequence, not one for all.
        num_val: sequences of validation.
        data_seed: of the table and of validation (the run's seed draws what is trained on).
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
        """Raise ValueError on a tokenizer of text or a table beyond memory."""
        super().check(tokenizer, seq)
        vocab = tokenizer.vocab_size or 0
        most = _MOST_ENTRIES[self.in_context]
        if vocab ** (self.order + 1) > most:
            raise ValueError(
                f"tokenizer.vocab_size={vocab} at order={self.order} makes a table of {vocab ** (self.order + 1):.1e} "
                f"entries{' for each sequence' * self.in_context}, more than {most:.1e}; lower one"
            )

    def examples(self, vocab_size: int, seq: int, seed: int, split: Split) -> "MarkovSamples":
        """See `SyntheticConfig`."""
        from runner.data.markov import MarkovSamples  # noqa: PLC0415

        address = (seed, 1) if split == "train" else (self.data_seed, 2)
        return MarkovSamples(self, vocab_size, seq, address)
