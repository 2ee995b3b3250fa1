"""A data set that is no text: rows that count up by a stride."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Sample = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CounterConfig:
    """Rows of numbers, each `stride` more than the one before."""

    stride: int = 1

    def build(self, tokenizer: Any, cache: Path, hashes: list[str] | None = None) -> "Counter":
        """Return the corpus."""
        return Counter(tokenizer.build(()), self.stride)


class Counter:
    """The corpus: example i begins where the seed says."""

    def __init__(self, tokenizer: Any, stride: int) -> None:
        self.tokenizer, self.stride = tokenizer, stride

    def samples(self, seq: int, seed: int) -> "Rows":
        """Return the examples of training."""
        return Rows(self, seq, seed)

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """Yield those of validation."""
        rows = Rows(self, seq, -1)
        count = max(1, max_tokens // seq)
        for start in range(0, count, batch):
            some = [rows[i] for i in range(start, min(start + batch, count))]
            yield {key: torch.stack([row[key] for row in some]) for key in some[0]}


class Rows:
    """A dataset by its `__getitem__` alone."""

    def __init__(self, corpus: Counter, seq: int, seed: int) -> None:
        self.corpus, self.seq, self.seed = corpus, seq, seed

    def __getitem__(self, index: int) -> Sample:
        """Return example `index`."""
        size = self.corpus.tokenizer.vocab_size - 1
        first = (index * 7919 + self.seed * 104729) % size
        ids = (first + torch.arange(self.seq + 1) * self.corpus.stride) % size
        return {"tokens": ids[:-1], "targets": ids[1:], "index": torch.tensor(index)}
