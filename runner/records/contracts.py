"""What a class of anybody's must have to take part; nothing is to be subclassed, no attribute is required
that has a default here.

Work (what a run does), Task (what is learnt), Evaluation (what is measured): a YAML node in conf/ names the
config class of each by its `_target_`. Models: `models/language_model.py`; data sets, tokenizers and sources:
`runner/data/corpus.py`; inputs, the fourth contract: `runner/records/inputs.py`.
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
    """A kind of work, `conf/work/x.yaml`.

    Optional:
        reads: the nodes of the config that it needs (default: all); others are neither validated nor hashed.
        outputs: names of the files that it writes below outputs/.
        plan: see `plan`.
    """

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """Do the work of `cell`: to its end, or until `stop` comes true.

        Every rank calls it; `journal` is None on all but the first. What is given up by `stop` is taken up by
        the next attempt.
        """


class TaskConfig(Protocol):
    """What is learnt, `conf/task/x.yaml`."""

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "Task":
        """Return the task for `model` (not wrapped for several processes, not compiled)."""


class Task(Protocol):
    """A batch's loss and what a model is judged by.

    Optional:
        measure: (name, "min" or "max"): the value that chooses the best checkpoint (default: val_loss, min).
        draw: see `draw`. count: see `count`.
    """

    def loss(self, model: Any, batch: Batch, noise: "NoiseKey | None") -> "TokenLoss":
        """Return the loss of a micro-batch; `model` (it may be wrapped) is called once."""

    def validate(self, model: Any, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Return name: (sum, count) of a batch; the values logged are sums over sums of all batches.

        Of a name that ends with `bits_per_byte` the sum is in nats and the count in bytes.
        """


@dataclass(frozen=True)
class Trained:
    """A model as evaluations find it.

    Args:
        model: neither wrapped nor compiled; `autocast` enters the precision that it trains in.
        task, corpus, cfg, ranks: of its run.
        step: of training; last: whether it is the last one.
        folder: where files go, None in all processes but the first.
        scored: (folder, step) of the run whose evals/ get the scores.
        suffix: ends the names of values, "_average" of averaged weights.
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


class Evaluation(Protocol):
    """Something measured of a model, `conf/eval/also/x.yaml`; the config class itself.

    Optional:
        every: steps between (None: at the end only), or "validation": with each of these. Default: None.
    """

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return the values by the names under which they are logged. Every rank calls it."""


def reads(work: Any) -> tuple[str, ...]:
    """Return the nodes that a kind of work needs."""
    return tuple(getattr(work, "reads", _ALL_NODES))


def outputs(work: Any) -> tuple[str, ...]:
    """Return the names of the files that a kind of work leaves in outputs/."""
    return tuple(getattr(work, "outputs", ()))


def plan(work: Any, run: "RunConfig") -> "Budget | None":
    """Return the sizes of a run; None where they are not known before it (an untrained tokenizer), or there are none."""
    planned = getattr(work, "plan", None)
    return planned(run) if planned is not None else None


def measure(task: Any) -> Measure:
    """Return the value that chooses the best checkpoint, and which way."""
    found: Measure = getattr(task, "measure", ("val_loss", "min"))
    return found


def draw(task: Any, model: Any, batches: Sequence[Batch], noise: "NoiseKey") -> Sequence[Batch]:
    """Return the micro-batches of a step with what the task draws itself (rollouts, masks); by default as they are.

    Once a step, before `count`, without gradient, by the model that is not wrapped; all ranks make equally many
    forward passes. A resume does it again.
    """
    drawn = getattr(task, "draw", None)
    return drawn(model, batches, noise) if drawn is not None else batches


def count(task: Any, batch: Batch) -> "Tensor":
    """Return what a batch's loss is divided by, summed over the step and all ranks; by default its targets."""
    counted = getattr(task, "count", None)
    found: Tensor = counted(batch) if counted is not None else (batch["targets"] >= 0).sum()
    return found


def cadence(evaluation: Any) -> int | Literal["validation"] | None:
    """Return the steps between two runs of an evaluation; "validation": with each of these; None: at the end only."""
    found: int | Literal["validation"] | None = getattr(evaluation, "every", None)
    return found


def check(cfg: Any, *given: Any) -> None:
    """Let a config that has a `check` refuse what it is to work with; ValueError says what."""
    refuse = getattr(cfg, "check", None)
    if refuse is not None:
        refuse(*given)
