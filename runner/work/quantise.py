"""Weights of a trained model in few bits, as a kind of work, and what they cost."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

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
from runner.work.quantisation_cost import compared, decoding_speeds


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
    rows, values = compared(setup, before)
    write_output(cell.folder, "losses.json", json.dumps(rows) + "\n", journal)
    values |= _sizes(setup, scheme, saved) | decoding_speeds(setup, before)
    values["quantise_s"] = seconds
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
