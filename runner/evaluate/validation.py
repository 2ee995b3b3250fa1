"""What a model is judged by on the held-out split, as its task says."""

import itertools
import math
from collections.abc import Iterator

import torch

from runner.data.corpus import Sample, bytes_per_counted_byte
from runner.records.contracts import Trained

_BITS = "bits_per_byte"


@torch.no_grad()
def validate(trained: Trained) -> dict[str, float]:
    """Return the values of the task's `validate` over at most `eval.tokens` tokens, shared among ranks.

    `val_tokens` is how many targets were counted.
    """
    corpus, cfg, ranks = trained.corpus, trained.cfg, trained.ranks
    sums: dict[str, tuple[float, float]] = {}
    tokens = 0
    batches = corpus.held_out(cfg.train.sequence_length, cfg.eval.batch_size, cfg.eval.tokens)
    # Sharded parameters are gathered in every forward pass, so all ranks make the same number of
    # them; who has no batch of its own left repeats the last one without counting it.
    for mine, batch in dealt(batches, ranks.rank, ranks.world):
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
    found = {}
    for name, (total, number) in sorted(sums.items()):
        total, number = ranks.sum(total), ranks.sum(number)
        if name.endswith(_BITS):
            number = math.log(2) * max(1.0, number * bytes_per_counted_byte(corpus))
        found[name] = total / number if number else math.nan
    return found | {"val_tokens": int(ranks.sum(tokens))}


def to_device(batch: Sample, device: torch.device, *, masked: bool) -> Sample:
    """Return the batch on `device`, without `documents` where tokens see across them."""
    return {
        key: value.to(device, non_blocking=True)
        for key, value in batch.items()
        if masked or key != "documents"
    }


def dealt(batches: Iterator[Sample], rank: int, world: int) -> Iterator[tuple[bool, Sample]]:
    """Yield every world-th batch from number `rank` on, (True, batch), filled up with (False, last)."""
    while round_ := list(itertools.islice(batches, world)):
        yield rank < len(round_), round_[min(rank, len(round_) - 1)]
