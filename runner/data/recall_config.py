"""Multi-query associative recall, its config; `runner/data/recall.py` says what it tests."""

from typing import TYPE_CHECKING, ClassVar

from models.config import config, execution
from runner.data.synthetic_config import Split, SyntheticConfig
from runner.data.tokenizers_config import TokenizerConfig

if TYPE_CHECKING:
    from runner.data.recall import RecallSamples


@config
class RecallConfig(SyntheticConfig):
    """Examples of associative recall, each of `train.sequence_length` tokens; goes with tokenizer=symbols.

    Args:
        num_pairs: keys and values of an example, each asked once.
        num_train, num_val: examples; training goes through its own over and over, in a new order each time.
        power: of the law of distances, p(gap) ~ power x gap^(power - 1).
        data_seed: of the examples (the run's seed orders them).
    """

    name: ClassVar[str] = "recall"

    num_pairs: int = 8
    num_train: int = 20000
    num_val: int = 1000
    power: float = 0.01
    data_seed: int = 0
    num_workers: int = execution(0)

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_train", "num_val"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def check(self, tokenizer: TokenizerConfig, seq: int) -> None:
        """Raise ValueError on a tokenizer of text, too small a vocabulary or no room for the questions."""
        super().check(tokenizer, seq)
        if (tokenizer.vocab_size or 0) // 2 <= self.num_pairs:
            raise ValueError(
                f"tokenizer.vocab_size={tokenizer.vocab_size} must exceed 2 x {self.num_pairs + 1}, keys and values of num_pairs={self.num_pairs}"
            )
        if seq < 4 * self.num_pairs:
            raise ValueError(
                f"train.sequence_length={seq} has no room for {self.num_pairs} pairs and as many questions "
                f"two apart; raise it to {4 * self.num_pairs} or lower data.num_pairs"
            )

    def examples(self, vocab_size: int, seq: int, seed: int, split: Split) -> "RecallSamples":
        """See `SyntheticConfig`."""
        from runner.data.recall import RecallSamples  # noqa: PLC0415

        return RecallSamples(self, vocab_size, seq, seed, split)
