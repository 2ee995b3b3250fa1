"""Multi-query associative recall, the test of what a mixer remembers (Zoology, Arora et al., arXiv 2312.04927).

    k1 v1 k2 v2 ... | . . k2 . . . k1 . .          predict v2 where k2 comes again, v1 where k1 does

Keys come from the lower half of the vocabulary, values from the upper; where a key is asked again the next value is the
target, nowhere else; between them stand random tokens. Near places are asked more often, by a power law.
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
    """Example i is a function of (data_seed, half, i); which one is sample i, of (seed, i)."""

    def __init__(
        self, cfg: RecallConfig, vocab_size: int, seq: int, seed: int, split: Split = "train"
    ) -> None:
        self.cfg, self.vocab_size, self.seq, self.seed, self.split = (
            cfg,
            vocab_size,
            seq,
            seed,
            half,
        )
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: int) -> Sample:
        if self.split == "val":
            return self.example(index, index)
        epoch, place = divmod(index, self.cfg.num_train)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch).permutation(self.cfg.num_train)
        return self.example(int(self._order[1][place]), index)

    @cached_property
    def _distances(self) -> np.ndarray:
        """Probability of each gap, of which the question is twice as far behind the pairs."""
        gaps = np.arange(1, (self.seq - 2 * self.cfg.num_pairs) // 2 + 1)
        law: np.ndarray = gaps ** (self.cfg.power - 1.0)
        return np.asarray(law / law.sum())

    def example(self, number: int, index: int) -> Sample:
        """Return one example as a sample."""
        pairs, half = self.cfg.num_pairs, self.vocab_size // 2
        rng = generator(self.cfg.data_seed, 1 + (self.split == "val"), number)
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.choice(self.vocab_size - half, pairs, replace=False)
        tokens = rng.integers(0, self.vocab_size, self.seq)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        targets = np.full(self.seq, -100)
        asked = 2 * pairs + 2 * rng.choice(
            len(self._distances), pairs, replace=False, p=self._distances
        )
        tokens[asked], targets[asked] = keys, values
        return {
            "tokens": torch.from_numpy(tokens.astype(np.int64)),
            "targets": torch.from_numpy(targets.astype(np.int64)),
            "documents": torch.zeros(self.seq, dtype=torch.int64),
            "index": torch.tensor(index),
        }
