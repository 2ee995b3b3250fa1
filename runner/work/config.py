"""The kinds of work as data, `conf/work`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from models.config import config
from runner.data.corpus import planned_vocab_size
from runner.records.contracts import Inputs, Outcome

if TYPE_CHECKING:
    from runner.machine.ranks import Ranks
    from runner.records.budget import Budget
    from runner.records.cells import Cell
    from runner.records.config import RunConfig
    from runner.records.journal import Journal


@config
class TrainWork:
    """Train a model: from its initialisation, from `init`, or from the input named init."""

    def plan(self, run: "RunConfig") -> "Budget | None":
        """Return the sizes of the run; None while the vocabulary is unknown."""
        from runner.records.budget import budget  # noqa: PLC0415

        vocab = planned_vocab_size(run.tokenizer)
        return None if vocab is None else budget(run, vocab)

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.train import train  # noqa: PLC0415

        return train(cell, inputs, journal, ranks, stop)


@config
class EvaluateWork:
    """Evaluate the input named init, or the model of `init`, as it is or, if it is live, each checkpoint as it comes."""

    def plan(self, run: "RunConfig") -> "Budget | None":
        """Return the sizes of the model; it takes no step."""
        from runner.records.budget import budget  # noqa: PLC0415

        vocab = planned_vocab_size(run.tokenizer)
        return None if vocab is None else budget(run, vocab, steps=0)

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.evaluate import evaluate  # noqa: PLC0415

        return evaluate(cell, inputs, journal, ranks, stop)


@config
class MakeWork:
    """Make data: documents that the model of the input named init writes, one JSON line each.

    Args:
        documents: how many. tokens: of each at most. temperature: of sampling. prompt: what each continues
            (nothing: the end of the document before).
    """

    reads: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("documents.jsonl",)

    documents: int = 1000
    tokens: int = 256
    temperature: float = 1.0
    prompt: str = "\n"

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.make import make  # noqa: PLC0415

        return make(self, cell, inputs, journal, ranks, stop)


@config
class WeighWork:
    """Choose the weights of data sources by what proxies of other weights have reached: the input named proxies.

    A regression predicts `metric` from the weights; the mean of the best `keep` of `candidates` mixtures, drawn at
    random around those of the proxies, is written (RegMix: Liu et al., arXiv 2407.01492, with a linear fit).

    Args:
        log: regress the logarithm of the metric. concentration: of the Dirichlet draws, around the proxies' mean.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[tuple[str, ...]] = ("weights.json", "regression.json")

    metric: str = "val_loss"
    log: bool = True
    candidates: int = 100_000
    keep: int = 100
    concentration: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.candidates:
            raise ValueError(
                f"keep={self.keep} must lie between 1 and candidates={self.candidates}"
            )
        if self.concentration <= 0:
            raise ValueError(f"concentration={self.concentration} must be positive")

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.weigh import weigh  # noqa: PLC0415

        return weigh(self, cell, inputs, journal, ranks, stop)
