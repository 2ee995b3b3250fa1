"""The protocols that user classes implement, without subclassing: Work, Task, Evaluation.

A YAML node in conf/ names each config class by its `_target_`. Attributes under "Optional" have a
default: the function of the same name below. Models: `models/contract.py`; data sets, tokenizers
and sources: `runner/data/corpus.py`; inputs of a run: `runner/records/inputs.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.philox import NoiseKey
    from models.language_model import TokenLoss
    from runner.machine.ranks import Ranks
    from runner.records.budget import Budget
    from runner.records.cells import Cell
    from runner.records.config import RunConfig
    from runner.records.journal import Journal

Outcome = Literal["finished", "diverged", "interrupted"]
Batch = dict[str, "Tensor"]
Inputs = Mapping[str, tuple[Path, ...]]  # folders of the runs of each input
Measure = tuple[str, Literal["min", "max"]]
_ALL_NODES = (
    "model",
    "precision",
    "data",
    "tokenizer",
    "task",
    "optim",
    "schedule",
    "train",
    "eval",
)


class Work(Protocol):
    """What a run does, `conf/work/x.yaml`.

    Optional:
        reads: nodes of the config that it needs (default: all); no other is validated or hashed.
        outputs: names of the files that it writes to outputs/ (default: none).
        plan, stored_form: see the functions of these names.
    """

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """Do the work of `cell` until it is done or `stop` returns true; return how it ended.

        All ranks call it; `journal` is None on all but the first. The next attempt continues what
        `stop` interrupted.
        """


class TaskConfig(Protocol):
    """The config of a Task, `conf/task/x.yaml`.

    Optional:
        tokens: names of the special tokens that it adds to the vocabulary (default: none).
        check: raise ValueError if it does not fit the run, given as RunConfig.
        strategy: see the function `strategy`.
        scorer: see the function `scorer`.
        sequences_per_sample: those that a step trains on for each sample of the data (default: 1).
    """

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "Task":
        """Return the task for `model`, which is neither wrapped (DDP, FSDP) nor compiled.

        Its weights are not loaded yet. `inputs["init"]` is the folder of the run that it starts
        from, or that of the pretrained model.
        """


class Task(Protocol):
    """The training loss and the validation values.

    Optional:
        measure: (name, "min" or "max"), the value that chooses the best checkpoint (default:
            val_loss, min).
        draw, count, planned: see the functions of these names.
    """

    def loss(self, model: Any, batch: Batch, noise: "NoiseKey | None") -> "TokenLoss":
        """Return the loss of a micro-batch; call `model`, which may be wrapped, exactly once."""

    def validate(self, model: Any, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Return {name: (sum, count)} of a batch; the run logs total sum / total count per name.

        Where a name ends with `bits_per_byte`, sums are in nats and counts in bytes. Where it ends
        with `_stderr`, sums are of variances, and the run logs sqrt(total sum) / total count.
        """


@dataclass(frozen=True)
class Trained:
    """A trained model and its run, handed to evaluations.

    Args:
        model: neither wrapped nor compiled; `autocast` enters the precision that it trains in.
        task, corpus, cfg, ranks: those of its run.
        step: the training step.
        last: whether it is the last step of training.
        folder: where files go; None on all ranks but the first.
        scored: (folder, step) of the run whose evals/ get the scores.
        suffix: ends the names of values; "_average" for averaged weights.
        start: the folder of the run, or of the model made elsewhere, that training started from;
            None: it started from what the seed gives.
    """

    model: Any
    task: Any
    corpus: Any
    cfg: "RunConfig"
    precision: Any
    ranks: "Ranks"
    step: int
    last: bool
    folder: Path | None
    scored: tuple[Path, int] | None = None
    suffix: str = ""
    start: Path | None = None


class Evaluation(Protocol):
    """A measurement of a trained model, `conf/eval/also/x.yaml`; the config class itself.

    Optional:
        every: steps between two runs, "validation" (with each validation) or None (at the end
            only). Default: None.
        check: raise ValueError if it does not fit the run, given as RunConfig.
    """

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return {name: value} to log; all ranks call it."""


def reads(work: Any) -> tuple[str, ...]:
    """Return the nodes of the config that `work` needs."""
    return tuple(getattr(work, "reads", _ALL_NODES))


def outputs(work: Any) -> tuple[str, ...]:
    """Return the names of the files that `work` writes to outputs/."""
    return tuple(getattr(work, "outputs", ()))


def plan(work: Any, run: "RunConfig") -> "Budget | None":
    """Return the sizes of `run`; None if `work` has none or they are unknown yet.

    They are unknown while the tokenizer is untrained, for example.
    """
    planned = getattr(work, "plan", None)
    return planned(run) if planned is not None else None


def stored_form(work: Any, model: Any) -> None:
    """Put a new model into the form of the checkpoints that `work` writes, in place.

    By default it stays as its config builds it.
    """
    own = getattr(work, "stored_form", None)
    if own is not None:
        own(model)


def measure(task: Any) -> Measure:
    """Return (name, "min" or "max") of the value that chooses the best checkpoint."""
    value: Measure = getattr(task, "measure", ("val_loss", "min"))
    return value


def added_tokens(task: Any) -> tuple[str, ...]:
    """Return the names of the special tokens that a task's config adds to the vocabulary."""
    return tuple(getattr(task, "tokens", ()))


def strategy(task: Any, model: Any, tokenizer: Any, context: int) -> Any:
    """Return how the model of a task's config generates, a `runner.generate.engine.Strategy`.

    None, the default: one token after the other.
    """
    own = getattr(task, "strategy", None)
    return own(model, tokenizer, context) if own is not None else None


def scorer(task: Any, model: Any, tokenizer: Any) -> Any:
    """Return how the model of a task's config judges answers.

    That has a method `scores`, from ids [batch, seq] to the probability at each that the answer,
    or its step, is right. None, the default: it does not judge.
    """
    own = getattr(task, "scorer", None)
    return own(model, tokenizer) if own is not None else None


def draw(task: Any, model: Any, batches: Sequence[Batch], noise: "NoiseKey") -> Sequence[Batch]:
    """Return the micro-batches of a step with the task's own samples added (rollouts, masks).

    By default they are returned as they are. Called once a step, before `count`, without gradient,
    with the model not wrapped; all ranks must make equally many forward passes. A resumed step
    draws again, with the same `noise`.
    """
    drawn = getattr(task, "draw", None)
    return drawn(model, batches, noise) if drawn is not None else batches


def planned(task: Any, model: Any, batch: Batch, noise: "NoiseKey") -> Batch:
    """Return what a micro-batch becomes in a step, of the largest shapes, to predict its memory.

    By default it is drawn; a task whose `draw` generates texts, which tensors without values cannot
    do, has its own `planned(batch)`. The memory of generating is not predicted.
    """
    own = getattr(task, "planned", None)
    if own is not None:
        return dict(own(batch))
    (drawn,) = draw(task, model, [batch], noise)
    return drawn


def count(task: Any, batch: Batch) -> "Tensor":
    """Return a batch's share of the loss's divisor, a scalar; by default its number of targets.

    The divisor is the sum over all micro-batches of the step and all ranks.
    """
    own_count = getattr(task, "count", None)
    if own_count is None:
        return (batch["targets"] >= 0).sum()
    share: Tensor = own_count(batch)
    return share


def cadence(evaluation: Any) -> int | Literal["validation"] | None:
    """Return the steps between two runs of `evaluation`, "validation" or None; see `Evaluation`."""
    every: int | Literal["validation"] | None = getattr(evaluation, "every", None)
    return every


def check(cfg: Any, *given: Any) -> None:
    """Call `cfg.check(*given)` if the config has a `check`.

    Raises:
        ValueError: `cfg` does not fit what is `given`; the message says why.
    """
    own_check = getattr(cfg, "check", None)
    if own_check is not None:
        own_check(*given)
