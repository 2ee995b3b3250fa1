"""Synthetic data sets, generated on the fly from a rule; they need tokenizer=symbols."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from runner.data.corpus import Sample
from runner.data.synthetic_config import SyntheticConfig
from runner.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class SyntheticCorpus:
    """The corpus of a `SyntheticConfig`; see `Corpus`."""

    cfg: SyntheticConfig
    tokenizer: Tokenizer
    bytes_per_counted_byte: float = 1.0

    def samples(self, seq: int, seed: int) -> Dataset[Sample]:
        """See `Corpus`."""
        return self.cfg.examples(self.tokenizer.vocab_size, seq, seed, "train")

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`: the first validation examples, as far as `max_tokens` allows."""
        count = max(1, min(self.cfg.num_val, max_tokens // seq))
        examples = self.cfg.examples(self.tokenizer.vocab_size, seq, 0, "val")
        for start in range(0, count, batch):
            rows = [examples[number] for number in range(start, min(start + batch, count))]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def generator(*address: int) -> np.random.Generator:
    """Return a random generator (Philox) seeded by the numbers of `address`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(address)))
