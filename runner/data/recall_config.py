"""The config of multi-query associative recall; see `runner/data/recall.py`."""

from typing import TYPE_CHECKING, ClassVar

from models.config import config, execution
from runner.data.synthetic_config import Split, SyntheticConfig
from runner.data.tokenizers_config import TokenizerConfig

if TYPE_CHECKING:
    from runner.data.recall import RecallSamples


@config
class RecallConfig(SyntheticConfig):
    """Examples of associative recall, each of `train.sequence_length` tokens.

    They need tokenizer=symbols.

    Args:
        num_pairs: pairs of key and value in an example; each key is repeated once.
        num_train, num_val: number of examples; each epoch of training has a new order.
        power: of the distances of repeated keys, p(gap) ~ power x gap^(power - 1).
        data_seed: of the examples (the run's seed orders them).
        num_workers: processes that make samples beside the training process.
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
        """Raise ValueError for a tokenizer of text, a small vocabulary or a short sequence."""
        super().check(tokenizer, seq)
        if (tokenizer.vocab_size or 0) // 2 <= self.num_pairs:
            raise ValueError(
                f"tokenizer.vocab_size={tokenizer.vocab_size} must exceed "
                f"2 x {self.num_pairs + 1}, keys and values of num_pairs={self.num_pairs}"
            )
        if seq < 4 * self.num_pairs:
            raise ValueError(
                f"train.sequence_length={seq} has no room for {self.num_pairs} pairs and as many "
                f"questions two apart; raise it to {4 * self.num_pairs} or lower data.num_pairs"
            )

    def examples(self, vocab_size: int, seq: int, seed: int, split: Split) -> "RecallSamples":
        """See `SyntheticConfig`."""
        from runner.data.recall import RecallSamples  # noqa: PLC0415

        return RecallSamples(self, vocab_size, seq, seed, split)
