"""Evaluation as a kind of work: of an ended run, a run in training, or a pretrained model."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from models.pretrained import load_weights
from runner.data.pretrained import pretrained_folder
from runner.evaluate.evaluations import Evaluations
from runner.learn.setup import Setup, set_up
from runner.learn.trainer import newest_checkpoint
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records import checkpoint, contracts
from runner.records.budget import budget
from runner.records.cells import Cell, load_cell
from runner.records.contracts import Inputs, Outcome
from runner.records.journal import Journal
from runner.records.new_checkpoints import last_evaluated, new_checkpoints
from runner.records.trained_model import load_trained
from runner.work.notes import note_environment, write_summary


def evaluate(
    cell: Cell, inputs: Inputs, journal: Journal | None, ranks: Ranks, stop: Callable[[], bool]
) -> Outcome:
    """Evaluate the model of the cell's input named init or, without one, of its `init`.

    Return "interrupted" if `stop` came true before a live input ended, else "finished".
    """
    cfg, setup = cell.config, set_up(cell, as_in_training(inputs), ranks, journal)
    taken = cfg.inputs.get("init")
    live = taken is not None and taken.live
    if journal is not None:
        judged = {"measure": contracts.measure(setup.task)}
        note_environment(journal, cell, ranks, micro_batch=cfg.eval.batch_size, **judged)
        vocab = setup.corpus.tokenizer.vocab_size
        sizes = budget(cfg, vocab, steps=0)
        write_summary(cell.folder, sizes, setup.precision, setup.corpus.tokenizer)
    done = last_evaluated(cell.folder) if live else 0
    if journal is not None and journal.number > 1:
        journal.restored(done)
    if taken is None:
        return _evaluate_pretrained(cell, setup, journal)
    run, average = inputs["init"][0], taken.take == "average"
    if not live:
        saved = newest_checkpoint(run)
        _load(run, saved, setup, average=average)
        _evaluate(cell, setup, journal, 0, (run, int(saved.name)), average=average)
        return "finished"
    for saved in new_checkpoints(run, done, stop):
        try:
            _load(run, saved, setup, average=average)
        except FileNotFoundError:
            continue  # deleted in favour of a newer one
        step = int(saved.name)
        _evaluate(cell, setup, journal, step, (run, step), average=average)
    return "interrupted" if stop() else "finished"


def as_in_training(inputs: Inputs) -> Inputs:
    """Return `inputs` with what the run evaluated started from as its init.

    A task that compares with that would else compare the model with itself.
    """
    if "init" not in inputs:
        return inputs
    others = {name: folders for name, folders in inputs.items() if name != "init"}
    evaluated = load_cell(inputs["init"][0])
    if "init" in evaluated.config.inputs:
        return others | {"init": evaluated.inputs["init"]}
    init = evaluated.config.init
    if init is None:
        return others
    try:
        return others | {"init": (pretrained_folder(init),)}
    except ConfigError:  # the folder is gone: few need it, and they fail when they read it
        return others | {"init": (Path(init.partition(":")[2]),)}


def _load(run: Path, saved: Path, setup: Setup, *, average: bool) -> None:
    """Load the weights of a checkpoint, and the scales of delayed scaling that belong to them."""
    load_trained(load_cell(run), saved, setup.model, average=average)
    setup.precision.load(checkpoint.load_tensors(saved, "precision"))


def _evaluate_pretrained(cell: Cell, setup: Setup, journal: Journal | None) -> Outcome:
    """Evaluate the model of `init` and save it as a checkpoint that other runs can start from."""
    if cell.config.init is not None:
        load_weights(pretrained_folder(cell.config.init), setup.model, put=checkpoint.like)
    _evaluate(cell, setup, journal, 0, None)
    files = checkpoint.gather(setup.model, [], {}, keep=journal is not None)
    if journal is not None and cell.config.init is not None:
        checkpoint.save(cell.folder / "checkpoints", files, {"step": 0})
        journal.event("checkpointed", step=0)
    return "finished"


def _evaluate(
    cell: Cell,
    setup: Setup,
    journal: Journal | None,
    step: int,
    scored: tuple[Path, int] | None,
    *,
    average: bool = False,
) -> None:
    """Evaluate the model, log all values at `step`, and write the scores to `scored` too.

    Args:
        scored: (folder, step) of the run evaluated.
        average: the model has averaged weights.
    """
    started, evaluations = time.monotonic(), Evaluations(cell.config.eval)
    folder = cell.folder if journal is not None else None
    trained = replace(
        setup.trained(step, folder, last=True), scored=scored, suffix="_average" if average else ""
    )
    with nullcontext() if journal is None else journal.evaluating():
        values = evaluations.validate(trained) | evaluations.further(trained)
    if journal is not None:
        journal.metrics(step, values | {"eval_s": time.monotonic() - started})
