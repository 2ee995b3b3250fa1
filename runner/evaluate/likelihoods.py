"""Log-probabilities of the ends of many texts; what several texts begin with is read once."""

from collections.abc import Sequence
from typing import Any

import torch

from models.config import couples_samples
from models.prefix_cache import PrefixCache
from runner.generate.generate import make_engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.records.contracts import Trained

_BLOCK, _PREFIX_BYTES = 32, 1 << 28  # of what all texts begin with


@torch.no_grad()
def log_probabilities(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[Sequence[int], int]],
    *,
    context: int,
    rows: int = 256,
    shares_prefixes: bool = True,
) -> list[list[float]]:
    """Return the log-probabilities, nats, of the scored ids of each text.

    Args:
        texts: (ids, the first that is scored, at least 1); at most `context` ids each.
        rows: the most texts that are read at a time.
        shares_prefixes: False for a model whose forward pass couples the rows of a batch.
    """
    prefixes = PrefixCache(block=_BLOCK, max_bytes=_PREFIX_BYTES) if shares_prefixes else None
    engine = make_engine(
        model, context=context, decode=tokenizer.decode, ends=(), rows=rows, prefixes=prefixes
    )
    how = Sampling(max_new_tokens=0)
    requests = (
        Request(id=str(number), prompt=list(ids), how=how, score_from=first)
        for number, (ids, first) in enumerate(texts)
    )
    found: list[list[float]] = [[] for _ in texts]
    for event in engine.run(requests):
        if event.error is not None:
            raise event.error
        if event.prompt_scores is not None:
            found[int(event.id)] = list(event.prompt_scores.logprobs)
    return found


def couples_rows(trained: Trained) -> bool:
    """Return whether what a row's numbers are depends on the other rows of its forward pass."""
    run = trained.cfg
    length = run.train.sequence_length
    return any(couples_samples(part, length) for part in (run.model, run.precision))
