"""The order of samples: the tokens of sample i are a function of (seed, i), with no state to save.

Sources are interleaved in blocks of 1024 samples with counts that follow the weights to within one
sample. Within a source each epoch visits the windows in a new random order, starting at another
offset so that window borders move.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from runner.data.corpus import Sample, Samples
from runner.machine.errors import DataError

if TYPE_CHECKING:
    from runner.data.tokens import TokenFile

_BLOCK = 1024


class TrainingSamples(Dataset[Sample]):
    """The training set of a text corpus; see `Corpus.samples`."""

    def __init__(
        self, files: list["TokenFile"], weights: list[float], seq: int, seed: int, eos: int
    ) -> None:
        self.files, self.seq, self.seed, self.eos = files, seq, seed, eos
        self.edges = np.cumsum([0.0, *weights]) / sum(weights)
        self._blocks: dict[int, np.ndarray] = {}
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        for file in files:
            if len(file.ids) <= 2 * seq:  # an epoch holds one at every offset
                raise DataError(
                    f"a training source has {len(file.ids)} tokens, not more than two sequences "
                    f"of {seq}; lower train.sequence_length or give more text"
                )

    def __getitem__(self, index: int) -> Sample:
        source, rank = self._locate(index)
        file = self.files[source]
        per_epoch = (len(file.ids) - 1) // self.seq - 1
        epoch, position = divmod(rank, per_epoch)
        offset, order = self._order(source, epoch, per_epoch)
        ids, documents = file.window(offset + int(order[position]) * self.seq, self.seq + 1)
        return to_sample(ids, documents, index)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return (the source of sample `index`, the number of its samples before this one)."""
        if len(self.files) == 1:
            return 0, index
        block, slot = divmod(index, _BLOCK)
        if block not in self._blocks:
            counts = np.diff(self._cumulative(block + 1)) - np.diff(self._cumulative(block))
            owners = np.repeat(np.arange(len(self.files)), counts)
            self._rng(1, block).shuffle(owners)
            self._blocks = {block: owners}
        owners = self._blocks[block]
        source = int(owners[slot])
        before = int(np.diff(self._cumulative(block))[source])
        return source, before + int((owners[:slot] == source).sum())

    def _cumulative(self, block: int) -> np.ndarray:
        return np.floor(block * _BLOCK * self.edges + 0.5).astype(np.int64)

    def _order(self, source: int, epoch: int, count: int) -> tuple[int, np.ndarray]:
        key = (source, epoch)
        if key not in self._orders:
            rng = self._rng(2, source, epoch)
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source}
            self._orders[key] = int(rng.integers(self.seq)), rng.permutation(count)
        return self._orders[key]

    def _rng(self, *address: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *address])))


def to_sample(ids: np.ndarray, documents: np.ndarray, index: int) -> Sample:
    """Return the sample of a window of seq + 1 ids: inputs and next-token targets, each [seq]."""
    tokens = torch.from_numpy(ids)
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "documents": torch.from_numpy(documents[:-1].astype(np.int64)),
        "index": torch.tensor(index),
    }


class _Batches:
    """Global sample indices of this rank's micro-batches, from `first_step` on."""

    def __init__(
        self, first_step: int, steps: int, batch: int, micro: int, rank: int, world: int
    ) -> None:
        self.steps, self.batch, self.micro = range(first_step, steps), batch, micro
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.world
        for step in self.steps:
            start = step * self.batch + self.rank * share
            for offset in range(0, share, self.micro):
                yield list(range(start + offset, start + offset + self.micro))


def training_loader(
    samples: Samples,
    *,
    first_step: int,
    steps: int,
    batch: int,
    micro: int,
    rank: int,
    world: int,
    num_workers: int,
) -> DataLoader[Sample]:
    """Return this rank's micro-batches in order; batch / world / micro of them make a step."""
    order = _Batches(first_step, steps, batch, micro, rank, world)
    return DataLoader(samples, batch_sampler=order, num_workers=num_workers)  # type: ignore[arg-type]


def validation_batches(
    files: list["TokenFile"], seq: int, batch: int, max_tokens: int
) -> Iterator[Sample]:
    """Yield the validation batches: windows spread evenly over the files, at most `max_tokens`.

    Raises:
        DataError: the files hold too few tokens to predict one.
    """
    # The last window of a file is shorter: its missing targets are -100 and do not count.
    windows = [(file, at) for file in files for at in range(0, len(file.ids) - 1, seq)]
    if not windows:
        size = sum(len(file.ids) for file in files)
        raise DataError(
            f"the validation split has {size} tokens, too few to predict one; "
            "raise data.val_fraction or give more text"
        )
    count = min(len(windows), max(1, max_tokens // seq))
    chosen = [windows[int(i)] for i in np.linspace(0, len(windows) - 1, count)]
    for start in range(0, count, batch):
        rows = [
            _padded(file, at, seq, start + i)
            for i, (file, at) in enumerate(chosen[start : start + batch])
        ]
        yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _padded(file: "TokenFile", at: int, seq: int, index: int) -> Sample:
    length = min(seq + 1, len(file.ids) - at)
    ids, documents = file.window(at, length)
    missing = (0, seq + 1 - length)
    sample = to_sample(np.pad(ids, missing), np.pad(documents, missing, mode="edge"), index)
    sample["targets"] = sample["targets"].clone()  # inputs and targets are views of one window
    sample["targets"][length - 1 :] = -100
    return sample
