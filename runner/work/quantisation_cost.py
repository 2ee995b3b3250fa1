"""What weights in few bits cost: the same held-out text by the model before and after."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.logit_rows import IGNORE
from models.contract import batch_logits, for_inference, read, start
from models.language_model import TokenLoss
from runner.evaluate.validation import to_device
from runner.learn.setup import Setup
from runner.records import contracts
from runner.records.contracts import Batch

_DRAWS = 2000  # of the bootstrap
_FEWEST = 10  # documents: an interval over fewer would be too narrow
_STEPS, _TURNS = 16, 3  # of decoding, timed; the fastest turn counts
Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a pass of a model says at its targets.

    Args:
        where: index of each target in the flattened batch.
        scores: log-probabilities of all ids.
        nll: of the target, nats.
    """

    where: Int64[Tensor, " rows"]
    scores: Float[Tensor, "rows vocab"]
    nll: Float[Tensor, " rows"]


@torch.no_grad()
def compared(setup: Setup, before: Any) -> tuple[list[Row], dict[str, float]]:
    """Return (losses of each held-out unit, metrics) of the model and of it `before`.

    A unit is a document; a sequence, where the task's measure is no sum over its targets or the
    text has fewer than ten documents. `loss_delta` is the mean difference of the measure,
    `loss_delta_low` and `_high` its 95% interval by a paired bootstrap over `loss_delta_units`;
    `kl` that of the new from the old distribution a token, nats; `top1_agreement` the share of
    tokens with the same likeliest next one. Each model reads a sequence once.
    """
    sequences: list[Row] = []
    documents: list[Row] | None = []
    kl, same, tokens, last = 0.0, 0, 0, 0
    for batch, indices in _sequences(setup):
        old, first = _judged(setup, before, batch)
        new, second = _judged(setup, setup.model, batch)
        sequences.append({"count": old[1], "before": old[0], "after": new[0]})
        for one, other in zip(first, second, strict=True):
            kl += float((one.scores.exp() * (one.scores - other.scores)).sum())
            same += int((one.scores.argmax(dim=-1) == other.scores.argmax(dim=-1)).sum())
            tokens += len(one.nll)
        if documents is not None and _is_sum(old, first) and _is_sum(new, second):
            last = _add_documents(documents, indices, last, first[0], second[0])
        else:
            documents = None
    units = sequences if documents is None or len(documents) < _FEWEST else documents
    values = np.array([[unit["after"] - unit["before"], unit["count"]] for unit in units])
    low, high = paired_interval(values, setup.cfg.seed)
    return units, {
        "loss_delta": float(values[:, 0].sum() / max(1.0, values[:, 1].sum())),
        "loss_delta_low": low,
        "loss_delta_high": high,
        "loss_delta_units": float(len(units)),
        "kl": kl / max(1, tokens),
        "top1_agreement": same / max(1, tokens),
    }


def paired_interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean difference.

    Args:
        values: (summed difference, count) of each unit, [units, 2].
    """
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(_DRAWS, len(values)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1.0), [0.025, 0.975])
    return float(low), float(high)


@torch.no_grad()
def decoding_speeds(setup: Setup, before: Any) -> dict[str, float]:
    """Return tokens/s of eager decoding of 1 and 8 texts, and of the model `before`, in turns.

    {} where the model does not write one token after the other.
    """
    cfg, tokenizer = setup.cfg, setup.corpus.tokenizer
    seq = cfg.train.sequence_length
    if contracts.strategy(cfg.task, setup.model, tokenizer, seq) is not None or seq < 2:
        return {}
    laid_out = {
        name: for_inference(copy.deepcopy(model))
        for name, model in (("", setup.model), ("_before", before))
    }
    steps = min(_STEPS, seq - 1)
    speeds: dict[str, float] = {}
    for rows in (1, 8):
        tokens = torch.zeros(rows, 1, dtype=torch.int64, device=setup.ranks.device)
        for _ in range(_TURNS):
            for name, model in laid_out.items():
                with setup.precision.autocast():
                    seconds = _seconds(model, tokens, seq, steps)
                key = f"tokens_per_s_{rows}{name}"
                speeds[key] = max(speeds.get(key, 0.0), rows * steps / seconds)
    return speeds


def _seconds(model: Any, tokens: Tensor, capacity: int, steps: int) -> float:
    state = start(model, len(tokens), capacity)
    read(model, tokens, state)
    began = time.perf_counter()
    for _ in range(steps):
        read(model, tokens, state).argmax(dim=-1).cpu()
    return time.perf_counter() - began


def _sequences(setup: Setup) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
    """Yield the held-out sequences one by one, and the document of each of their tokens."""
    cfg, masked = setup.cfg, bool(getattr(setup.cfg.data, "mask_documents", False))
    for batch in setup.corpus.held_out(cfg.train.sequence_length, 1, cfg.eval.tokens):
        tokens = batch["tokens"]
        documents = batch.get("documents", torch.zeros_like(tokens)).flatten().numpy()
        yield to_device(batch, setup.ranks.device, masked=masked), documents


def _judged(setup: Setup, model: Any, batch: Batch) -> tuple[tuple[float, float], list[Heard]]:
    """Return the task's measure (sum, count) of a batch and the passes that it took."""
    with setup.precision.autocast(), _hearing(model, batch) as heard:
        total, count = setup.task.validate(model, batch)[contracts.measure(setup.task)[0]]
        if not heard:  # a task that judges texts which the model writes
            batch_logits(model, batch)
    return (float(total), float(count)), heard


@contextmanager
def _hearing(model: nn.Module, batch: Batch) -> Iterator[list[Heard]]:
    """Note what each pass over whole sequences says at its targets.

    A pass that is asked for a loss makes logits in place of it, of which the loss is taken here:
    auxiliary losses, which no validation reports, are left out of its total.
    """
    heard: list[Heard] = []
    asked: list[tuple[Tensor | None, Any]] = []

    def ask(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        named = dict(named)
        weights, targets = named.pop("weights", None), named.pop("targets", None)
        named.pop("divisor", None)
        if len(given) > 1:
            given, targets = given[:1], given[1]
        asked.append((targets, weights))
        return given, named

    def note(_: nn.Module, given: Any, named: dict[str, Any], logits: Any) -> TokenLoss | None:
        targets, weights = asked.pop()
        if named.get("state") is not None or named.get("give") == "hidden":
            return None
        where = batch["targets"] if targets is None else targets
        if logits.shape[:-1] != where.shape:
            return None
        scores = logits.float().flatten(0, 1).log_softmax(dim=-1)
        counted = (where.flatten() != IGNORE).nonzero()[:, 0]
        picked = where.flatten()[counted]
        nll = -scores[counted, picked]
        heard.append(Heard(where=counted, scores=scores[counted], nll=nll))
        if targets is None:
            return None
        return _loss(
            scores.new_zeros(scores.shape[0]).index_copy(0, counted, nll), targets, weights
        )

    handles = [
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(note, with_kwargs=True),
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _loss(nll: Tensor, targets: Tensor, weights: Any) -> TokenLoss:
    if weights is None:
        total = nll.sum()
    elif isinstance(weights, Tensor):
        total = (weights.flatten() * nll).sum()
    else:
        total = (weights(nll, torch.arange(len(nll), device=nll.device)) * nll).sum()
    return TokenLoss(total=total, nll=nll.view(targets.shape))


def _is_sum(value: tuple[float, float], heard: list[Heard]) -> bool:
    """Return whether a measure is the sum of the losses of the targets of one pass."""
    if len(heard) != 1 or len(heard[0].nll) != value[1]:
        return False
    return bool(np.isclose(float(heard[0].nll.double().sum()), value[0], rtol=1e-4))


def _add_documents(
    rows: list[Row], documents: NDArray[np.int64], last: int, old: Heard, new: Heard
) -> int:
    """Add the losses of a sequence to those of their documents; return its last document.

    Documents are numbered from 1 through all text, or from 0 in each sequence, whose first one is
    then a new one. `last` is that of the sequence before.
    """
    of_targets = documents[old.where.cpu().numpy()]
    for document in np.unique(of_targets):
        here = torch.from_numpy(of_targets == document).to(old.nll.device)
        if not rows or document == 0 or document != last:
            rows.append({"count": 0.0, "before": 0.0, "after": 0.0})
        rows[-1]["count"] += float(here.sum())
        rows[-1]["before"] += float(old.nll[here].double().sum())
        rows[-1]["after"] += float(new.nll[here].double().sum())
        last = int(document)
    return last
