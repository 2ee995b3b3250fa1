"""Builds a run's model, data, precision and task on the device, for training and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from models.contract import blocks, read_vocabulary
from models.precision import Precision
from models.sizes import check_parameters
from runner.data.corpus import num_added, statistics, token_texts
from runner.data.pretrained import pretrained_folder
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records import contracts
from runner.records.cells import Cell
from runner.records.config import RunConfig
from runner.records.contracts import Inputs, Task, Trained
from runner.records.journal import Journal
from runner.records.run_data import build_corpus


@dataclass(frozen=True)
class Setup:
    """The parts of a run in one process; `model` is not wrapped for several processes yet."""

    cfg: RunConfig
    corpus: Any
    model: Any
    precision: Precision
    task: Task
    ranks: Ranks
    start: Path | None = None

    def trained(self, step: int, folder: Path | None, *, last: bool) -> Trained:
        """Return the model in the form that evaluations take."""
        return Trained(
            model=self.model,
            task=self.task,
            corpus=self.corpus,
            cfg=self.cfg,
            precision=self.precision,
            ranks=self.ranks,
            step=step,
            last=last,
            folder=folder,
            start=self.start,
        )


def set_up(cell: Cell, inputs: Inputs, ranks: Ranks, journal: Journal | None) -> Setup:
    """Return the initialised model of `cell` with its data, precision and task.

    Files read from inputs are recorded in the journal, see `build_corpus`.
    """
    cfg = cell.config
    hashes = [source["content"] for source in cell.science["data.sources"]]
    corpus = build_corpus(cfg, inputs, hashes, journal)
    counts = statistics(corpus, cfg.train.sequence_length)
    if journal is not None and counts:
        journal.event("data", **counts)
    vocab = corpus.tokenizer.vocab_size
    contracts.check(cfg.model, vocab, cfg.train.sequence_length)
    model = cfg.model.build(vocab, cfg.seed).to(ranks.device)
    model.added_rows = num_added(corpus.tokenizer)
    try:
        check_parameters(cfg.model, vocab, model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    read_vocabulary(model, lambda: token_texts(corpus.tokenizer))
    precision = cfg.precision.build(ranks.device)
    precision.prepare(model)
    cfg.train.check(ranks.world)
    if cfg.train.activation_checkpointing:
        recompute_blocks(model, precision)
    if ranks.world > 1 and cfg.train.parallel == "fsdp":
        ranks.shard(model)
    given = dict(inputs)
    if cfg.init is not None and "init" not in given:
        given["init"] = (pretrained_folder(cfg.init),)
    task = cfg.task.build(model, corpus.tokenizer, given)
    (start,) = given.get("init", (None,))
    return Setup(cfg, corpus, model, precision, task, ranks, start)


def recompute_blocks(model: nn.Module, precision: Precision) -> None:
    """Make every block drop its activations and compute them again in the backward pass."""
    for block in blocks(model):
        block.forward = _recomputed(block.forward, precision)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], precision: Precision) -> Callable[..., Any]:
    if not precision.native:
        return lambda *args, **given: recompute(forward, *args, use_reentrant=False, **given)
    contexts = precision.recompute_contexts
    # Not stopped early: TransformerEngine puts its scales back after the last of its layers.
    return lambda *args: recompute(
        forward, *args, use_reentrant=False, context_fn=contexts, early_stop=False
    )
