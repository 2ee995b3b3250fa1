"""Data that are made while training: numbers by a rule, with tokenizer=symbols and no text anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from runner.data.order import Sample
from runner.data.sources import SourceConfig
from runner.data.tokenizers import Tokenizer, TokenizerConfig

Half = Literal["train", "val"]


class MadeConfig:
    """What the configs of such data share; each says what its examples are.

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
    ) -> "MadeCorpus":
        """Return the corpus."""
        return MadeCorpus(self, tokenizer.build(()))

    def examples(self, vocab_size: int, seq: int, seed: int, half: Half) -> Dataset[Sample]:
        """Return example i for every i: of training in the order of `seed`, of validation always the same."""
        raise NotImplementedError


@dataclass(frozen=True)
class MadeCorpus:
    """See `MadeConfig`, and `Corpus`."""

    cfg: MadeConfig
    tokenizer: Tokenizer
    bytes_per_counted_byte: float = 1.0

    def samples(self, seq: int, seed: int) -> Dataset[Sample]:
        """See `Corpus`."""
        return self.cfg.examples(self.tokenizer.vocab_size, seq, seed, "train")

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`: the validation examples, or as many as `max_tokens` have room for."""
        count = max(1, min(self.cfg.num_val, max_tokens // seq))
        made = self.cfg.examples(self.tokenizer.vocab_size, seq, 0, "val")
        for start in range(0, count, batch):
            rows = [made[number] for number in range(start, min(start + batch, count))]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def generator(*address: int) -> np.random.Generator:
    """Return the random numbers of an address."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(address)))
