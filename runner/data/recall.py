"""Multi-query associative recall, a test of a mixer's memory (Zoology, arXiv 2312.04927).

    k1 v1 k2 v2 ... | . . k2 . . . k1 . .       predict v2 where k2 is repeated, v1 where k1 is

Keys come from the lower half of the vocabulary, values from the upper. Where a key is repeated its
value is the target; no other position has one. The tokens between are random, and distances of the
repeated keys follow a power law.
"""

from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from runner.data.corpus import Sample
from runner.data.recall_config import RecallConfig
from runner.data.synthetic import generator
from runner.data.synthetic_config import Split


class RecallSamples(Dataset[Sample]):
    """The dataset of a split: example n is a function of (data_seed, split, n).

    Which example is sample i is a function of (seed, i), in validation always example i.
    """

    def __init__(
        self, cfg: RecallConfig, vocab_size: int, seq: int, seed: int, split: Split = "train"
    ) -> None:
        self.cfg, self.vocab_size, self.seq = cfg, vocab_size, seq
        self.seed, self.split = seed, split
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: int) -> Sample:
        if self.split == "val":
            return self.example(index, index)
        epoch, position = divmod(index, self.cfg.num_train)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch).permutation(self.cfg.num_train)
        return self.example(int(self._order[1][position]), index)

    @cached_property
    def _distances(self) -> np.ndarray:
        """The probability of each gap 1, 2, ...: a key repeated 2 x (gap - 1) after the pairs."""
        gaps = np.arange(1, (self.seq - 2 * self.cfg.num_pairs) // 2 + 1)
        law: np.ndarray = gaps ** (self.cfg.power - 1.0)
        return np.asarray(law / law.sum())

    def example(self, number: int, index: int) -> Sample:
        """Return example `number` as the sample `index`."""
        pairs, half = self.cfg.num_pairs, self.vocab_size // 2
        rng = generator(self.cfg.data_seed, 1 + (self.split == "val"), number)
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.choice(self.vocab_size - half, pairs, replace=False)
        tokens = rng.integers(0, self.vocab_size, self.seq)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        targets = np.full(self.seq, -100)
        gaps = rng.choice(len(self._distances), pairs, replace=False, p=self._distances)
        queries = 2 * pairs + 2 * gaps
        tokens[queries], targets[queries] = keys, values
        return {
            "tokens": torch.from_numpy(tokens.astype(np.int64)),
            "targets": torch.from_numpy(targets.astype(np.int64)),
            "documents": torch.zeros(self.seq, dtype=torch.int64),
            "index": torch.tensor(index),
        }
