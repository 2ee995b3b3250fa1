"""Weights of a trained model in few bits, as a kind of work, and what they cost."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.contract import batch_logits
from models.pretrained import load_weights
from models.scheme import Scheme, parse_scheme
from models.stored_linear import compress, stored_layers
from runner.data.pretrained import pretrained_folder
from runner.evaluate.evaluations import Evaluations
from runner.evaluate.validation import to_device
from runner.learn.setup import Setup, set_up
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records import checkpoint, checkpoint_folder, contracts
from runner.records.budget import budget
from runner.records.cells import Cell, load_cell
from runner.records.contracts import Batch, Inputs, Outcome
from runner.records.journal import Journal
from runner.records.trained_model import load_trained
from runner.work.config import QuantiseWork
from runner.work.evaluate import as_in_training
from runner.work.notes import note_environment, write_summary
from runner.work.outputs import write_output

_DRAWS = 2000  # of the bootstrap


def quantise(
    cfg: QuantiseWork,
    cell: Cell,
    inputs: Inputs,
    journal: Journal | None,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> Outcome:
    """Write a checkpoint of the model in the form of `cfg.scheme`, and outputs/losses.json.

    Raises:
        ConfigError: there is neither an input named init nor `init`, several processes run, or the
            scheme changes nothing of this model.
    """
    if ranks.world > 1 or journal is None:
        raise ConfigError(
            f"work=quantise runs in one process, not {ranks.world}; set resources.gpus=1"
        )
    setup, scheme = set_up(cell, as_in_training(inputs), ranks, journal), parse_scheme(cfg.scheme)
    note_environment(journal, cell, ranks, measure=contracts.measure(setup.task))
    if journal.number > 1:
        journal.restored(0)
    tokenizer = setup.corpus.tokenizer
    sizes = budget(cell.config, tokenizer.vocab_size, steps=0)
    write_summary(cell.folder, sizes, setup.precision, tokenizer)
    _load(cell, inputs, setup.model)
    setup.model.eval()
    before, started = copy.deepcopy(setup.model), time.monotonic()
    try:
        compress(setup.model, scheme, _calibration(cfg, setup) if scheme.needs_data else None)
    except ValueError as error:
        raise ConfigError(f"work.scheme={cfg.scheme}: {error}") from None
    seconds = time.monotonic() - started
    saved = _save(cell, setup, journal)
    rows, values = _compared(setup, before)
    write_output(cell.folder, "losses.json", json.dumps(rows) + "\n", journal)
    values |= _sizes(setup, scheme, saved) | {"quantise_s": seconds}
    if scheme.needs_data:
        tokens = cfg.calibration * cell.config.train.sequence_length
        values["calibration_tokens"] = float(tokens)
    trained = replace(setup.trained(0, cell.folder, last=True), scored=(cell.folder, 0))
    evaluations = Evaluations(cell.config.eval)
    values |= evaluations.validate(trained) | evaluations.further(trained)
    journal.metrics(0, values)
    return "finished"


def _load(cell: Cell, inputs: Inputs, model: Any) -> None:
    """Load the weights to store."""
    taken = cell.config.inputs.get("init")
    if taken is not None:
        (run,) = inputs["init"]
        saved = checkpoint_folder.newest(run / "checkpoints")
        if saved is None:
            raise ConfigError(f"{run} has no checkpoint; train it first")
        load_trained(load_cell(run), saved, model, average=taken.take == "average")
    elif cell.config.init is not None:
        load_weights(pretrained_folder(cell.config.init), model, put=checkpoint.like)
    else:
        raise ConfigError(
            "work=quantise needs an input named init, the run whose weights it stores: "
            "inputs.init.runs=[...], or espalier quantise RUN"
        )


def _calibration(cfg: QuantiseWork, setup: Setup) -> Callable[[], None]:
    """Return what runs the model on training text, as its task does."""
    seq, size = setup.cfg.train.sequence_length, setup.cfg.eval.batch_size
    samples = setup.corpus.samples(seq, setup.cfg.seed)
    batches = [
        torch.utils.data.default_collate([samples[i] for i in some])
        for some in _parts(range(cfg.calibration), size)
    ]

    @torch.no_grad()
    def calibrate() -> None:
        for batch in batches:
            with setup.precision.autocast():
                setup.task.validate(setup.model, _on_device(setup, batch))

    return calibrate


def _parts(indices: range, size: int) -> Iterator[range]:
    for first in range(0, len(indices), size):
        yield indices[first : first + size]


def _save(cell: Cell, setup: Setup, journal: Journal) -> int:
    """Write the checkpoint; return the bytes of its weights."""
    files = checkpoint.gather(setup.model, [], {}, keep=True)
    saved = checkpoint.save(cell.folder / "checkpoints", files, {"step": 0})
    journal.event("checkpointed", step=0)
    return (saved / "model.safetensors").stat().st_size


@torch.no_grad()
def _compared(setup: Setup, before: Any) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return (losses of each held-out sequence, metrics) of the model and of it `before`.

    `loss_delta` is the mean difference of the task's measure, `loss_delta_low` and `_high` its 95%
    interval by a paired bootstrap over sequences; `kl` that of the new from the old distribution a
    token, nats; `top1_agreement` the share of tokens with the same likeliest next one.
    """
    name = contracts.measure(setup.task)[0]
    rows, kl, same, tokens = [], 0.0, 0, 0
    for batch in _sequences(setup):
        pair, scores = [], []
        for model in (before, setup.model):
            with setup.precision.autocast():
                pair.append(setup.task.validate(model, batch)[name])
                scores.append(batch_logits(model, batch).float().log_softmax(dim=-1))
        counted = batch["targets"] >= 0
        old, new = (score[counted] for score in scores)
        kl += float((old.exp() * (old - new)).sum())
        same += int((old.argmax(dim=-1) == new.argmax(dim=-1)).sum())
        tokens += len(old)
        rows.append({"count": pair[0][1], "before": pair[0][0], "after": pair[1][0]})
    values = np.array([[row["after"] - row["before"], row["count"]] for row in rows])
    low, high = paired_interval(values, setup.cfg.seed)
    delta = float(values[:, 0].sum() / max(1.0, values[:, 1].sum()))
    metrics = {"loss_delta": delta, "loss_delta_low": low, "loss_delta_high": high}
    measured = max(1, tokens)
    return rows, metrics | {"kl": kl / measured, "top1_agreement": same / measured}


def paired_interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean difference.

    Args:
        values: (summed difference, count) of each sequence, [sequences, 2].
    """
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(_DRAWS, len(values)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1.0), [0.025, 0.975])
    return float(low), float(high)


def _sequences(setup: Setup) -> Iterator[Batch]:
    """Yield the held-out sequences one by one."""
    cfg = setup.cfg
    for batch in setup.corpus.held_out(cfg.train.sequence_length, 1, cfg.eval.tokens):
        yield _on_device(setup, batch)


def _on_device(setup: Setup, batch: Batch) -> Batch:
    masked = bool(getattr(setup.cfg.data, "mask_documents", False))
    return to_device(batch, setup.ranks.device, masked=masked)


def _sizes(setup: Setup, scheme: Scheme, saved: int) -> dict[str, float]:
    layers = stored_layers(setup.model).values()
    weights, size = (
        sum(layer.num_frozen for layer in layers),
        sum(layer.num_bytes() for layer in layers),
    )
    return {
        "bits_per_weight": 8.0 * size / weights,
        "stored_weights": float(weights),
        "stored_bytes": float(size),
        "checkpoint_bytes": float(saved),
        "emulated": float(scheme.is_emulated),
    }
