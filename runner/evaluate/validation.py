"""Validation: the task's measures on the held-out split."""

import itertools
import math
from collections.abc import Iterator

import torch

from runner.data.corpus import Sample, bytes_per_counted_byte
from runner.records.contracts import Trained

_BITS, _STDERR = "bits_per_byte", "_stderr"


@torch.no_grad()
def validate(trained: Trained) -> dict[str, float]:
    """Return the task's measures over at most `eval.tokens` tokens, and `val_tokens`.

    The batches are shared among the ranks, and every rank returns the same values. `val_tokens` is
    the number of targets counted.
    """
    corpus, cfg, ranks = trained.corpus, trained.cfg, trained.ranks
    sums: dict[str, tuple[float, float]] = {}
    tokens = 0
    batches = corpus.held_out(cfg.train.sequence_length, cfg.eval.batch_size, cfg.eval.tokens)
    # Sharded parameters are gathered in every forward pass, so all ranks make the same number of
    # them; a rank without a batch left repeats the last one without counting it.
    for mine, batch in rank_share(batches, ranks.rank, ranks.world):
        on_device = to_device(
            batch, ranks.device, masked=getattr(cfg.data, "mask_documents", False)
        )
        with trained.precision.autocast():
            values = trained.task.validate(trained.model, on_device)
        if mine:
            tokens += int((batch["targets"] >= 0).sum())
        for name, (total, number) in values.items():
            before = sums.get(name, (0.0, 0.0))
            if mine:
                before = before[0] + float(total), before[1] + float(number)
            sums[name] = before
    measures = {}
    for name, (total, number) in sorted(sums.items()):
        total, number = ranks.sum(total), ranks.sum(number)
        if name.endswith(_BITS):
            number = math.log(2) * max(1.0, number * bytes_per_counted_byte(corpus))
        if name.endswith(_STDERR):
            total = math.sqrt(total)
        measures[name] = total / number if number else math.nan
    return measures | {"val_tokens": int(ranks.sum(tokens))}


def to_device(batch: Sample, device: torch.device, *, masked: bool) -> Sample:
    """Return the batch on `device`; without `masked` leave out `documents`."""
    return {
        key: value.to(device, non_blocking=True)
        for key, value in batch.items()
        if masked or key != "documents"
    }


def rank_share(batches: Iterator[Sample], rank: int, world: int) -> Iterator[tuple[bool, Sample]]:
    """Yield (True, batch) for every world-th batch from number `rank` on.

    A rank that has one batch less than others yields (False, last batch) in the end.
    """
    while round_ := list(itertools.islice(batches, world)):
        yield rank < len(round_), round_[min(rank, len(round_) - 1)]
