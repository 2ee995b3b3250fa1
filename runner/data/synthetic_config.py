"""What the configs of synthetic data sets share."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from runner.data.sources import SourceConfig
from runner.data.tokenizers_config import TokenizerConfig

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from runner.data.corpus import Sample
    from runner.data.synthetic import SyntheticCorpus

Split = Literal["train", "val"]


class SyntheticConfig:
    """Base of the configs of synthetic data sets; each says what its examples are.

    Args:
        name: of its node in conf/data. num_val: examples of validation.
    """

    sources: ClassVar[tuple[SourceConfig, ...]] = ()
    mask_documents: ClassVar[bool] = False
    name: ClassVar[str]

    num_val: int

    def content_hash(self) -> list[str]:
        """Return nothing: what is made of these numbers has no other content."""
        return []

    def check(self, tokenizer: TokenizerConfig, seq: int) -> None:
        """Raise ValueError on a tokenizer of text, and on what else does not fit."""
        if tokenizer.kind != "symbols":
            raise ValueError(
                f"data={self.name} is of numbers; use tokenizer=symbols, not tokenizer.kind={tokenizer.kind}"
            )

    def build(
        self, tokenizer: TokenizerConfig, cache: Path, hashes: list[str] | None = None
    ) -> "SyntheticCorpus":
        """Return the corpus."""
        from runner.data.synthetic import SyntheticCorpus  # noqa: PLC0415

        return SyntheticCorpus(self, tokenizer.build(()))

    def examples(self, vocab_size: int, seq: int, seed: int, split: Split) -> "Dataset[Sample]":
        """Return the dataset whose item i is example i: of training in the order of `seed`, of validation always the same."""
        raise NotImplementedError
