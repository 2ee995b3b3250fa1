"""The base class of the configs of synthetic data sets."""

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
    """Base class of the configs of synthetic data sets; a subclass defines `examples`.

    Args:
        name: the name of its node in conf/data.
        num_val: number of validation examples.
    """

    sources: ClassVar[tuple[SourceConfig, ...]] = ()
    mask_documents: ClassVar[bool] = False
    name: ClassVar[str]

    num_val: int

    def content_hash(self) -> list[str]:
        """Return []: the data follow from the config alone."""
        return []

    def check(self, tokenizer: TokenizerConfig, seq: int) -> None:
        """Raise ValueError for a tokenizer of text; subclasses check further."""
        if tokenizer.kind != "symbols":
            raise ValueError(
                f"data={self.name} is of numbers; "
                f"use tokenizer=symbols, not tokenizer.kind={tokenizer.kind}"
            )

    def build(
        self, tokenizer: TokenizerConfig, cache: Path, hashes: list[str] | None = None
    ) -> "SyntheticCorpus":
        """Return the corpus; nothing is cached, so `cache` and `hashes` are not used."""
        from runner.data.synthetic import SyntheticCorpus  # noqa: PLC0415

        return SyntheticCorpus(self, tokenizer.build(()))

    def examples(self, vocab_size: int, seq: int, seed: int, split: Split) -> "Dataset[Sample]":
        """Return the dataset of a split, whose item i is sample i.

        `seed` orders or draws the training samples; those of validation do not depend on it.
        """
        raise NotImplementedError
