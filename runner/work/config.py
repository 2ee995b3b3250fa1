"""The configs of the kinds of work, `conf/work`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.config import any_config, any_configs, config
from models.scheme import parse_scheme
from runner.data.corpus import planned_vocab_size
from runner.records.contracts import Inputs, Outcome, added_tokens

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
        """Return the budget of the run, None while the size of the vocabulary is unknown."""
        from runner.records.budget import budget  # noqa: PLC0415

        vocab = planned_vocab_size(run.tokenizer, added_tokens(run.task))
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
    """Evaluate the input named init, or the model of `init`.

    If the input is live, each of its checkpoints is evaluated as it is written.
    """

    def plan(self, run: "RunConfig") -> "Budget | None":
        """Return the budget of 0 steps, None while the size of the vocabulary is unknown."""
        from runner.records.budget import budget  # noqa: PLC0415

        vocab = planned_vocab_size(run.tokenizer, added_tokens(run.task))
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
    """Generate documents with the model of the input named init, one JSON line each.

    Args:
        documents: the number of documents.
        tokens: the most tokens of a document.
        temperature: of sampling.
        prompt: the text that each document continues (empty: the end of a document).
    """

    numerics = 2  # revision 1 drew from torch's generator, seeded by seed and document
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
class MakePeopleWork:
    """Write the texts and the database of data=people to files, with their checksums."""

    reads: ClassVar[tuple[str, ...]] = ("data",)
    outputs: ClassVar[tuple[str, ...]] = (
        "train.jsonl",
        "held_out.jsonl",
        "database.jsonl",
        "checksums.json",
    )

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.make_people import make_people  # noqa: PLC0415

        return make_people(cell, inputs, journal, ranks, stop)


@config
class QuantiseWork:
    """Store the weights of the input named init, or of the model of `init`, in few bits.

    It writes a checkpoint, from which the cell is evaluated, generates, is served and exported as
    any other; and it measures what that costs on held-out text. Output is losses.json, of each
    held-out document the loss before and after.

    Args:
        scheme: see `models.scheme`: int8, int4-g32, gptq-int4-g32, nf4, int8-dynamic, ...
        calibration: sequences of training text that a scheme reads which needs data.
    """

    numerics = 2  # revision 1 drew sequences, not documents, for the interval of loss_delta
    outputs: ClassVar[tuple[str, ...]] = ("losses.json",)

    scheme: str = "int8"
    calibration: int = 64

    def __post_init__(self) -> None:
        parse_scheme(self.scheme)
        if self.calibration < 1:
            raise ValueError(f"calibration={self.calibration} must be at least 1 sequence")

    def plan(self, run: "RunConfig") -> "Budget | None":
        """Return the budget of 0 steps, None while the size of the vocabulary is unknown."""
        return EvaluateWork().plan(run)

    def stored_form(self, model: Any) -> None:
        """Put a model into the form of the checkpoints that this work writes, in place."""
        from models.stored_linear import compress  # noqa: PLC0415

        compress(model, parse_scheme(self.scheme))

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.quantise import quantise  # noqa: PLC0415

        return quantise(self, cell, inputs, journal, ranks, stop)


@config
class SampleWork:
    """Draw solutions of the problems of `data` from the model of the input named init; judge them.

    Outputs are samples.jsonl, {prompt, answer, label} a line, and pairs.jsonl, {prompt, chosen,
    rejected}: of each problem with right and wrong samples the first of both, the second, ...

    Args:
        split: of the problems.
        problems: how many, the first of the split (None: all).
        samples: of each problem.
        pairs: the most pairs of a problem.
        max_new_tokens, temperature, top_k: of sampling.
        tools: that the model may call while it writes, by name; see `runner.generate.tools`.
        parser: finds the answer in a text, see `runner.data.answer_parsers` (None: the number
            after "####").
    """

    reads: ClassVar[tuple[str, ...]] = ("data",)
    outputs: ClassVar[tuple[str, ...]] = ("samples.jsonl", "pairs.jsonl")

    split: Literal["train", "val"] = "train"
    problems: int | None = None
    samples: int = 8
    pairs: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    tools: dict[str, Any] = any_configs()
    parser: Any = any_config()

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "pairs", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0: samples must differ")

    def run(
        self,
        cell: "Cell",
        inputs: Inputs,
        journal: "Journal | None",
        ranks: "Ranks",
        stop: Callable[[], bool],
    ) -> Outcome:
        """See `Work`."""
        from runner.work.sample import sample  # noqa: PLC0415

        return sample(self, cell, inputs, journal, ranks, stop)


@config
class WeighWork:
    """Choose the weights of data sources from proxy runs on other weights: the input `proxies`.

    A linear regression predicts `metric` from the weights. Of `candidates` mixtures, drawn around
    the proxies' mean, the `keep` with the lowest prediction are averaged (RegMix: Liu et al., arXiv
    2407.01492, with a linear fit).

    A linear fit is best at a corner: where sources help each other, the mixture that it names is
    too pure, and lies outside what the proxies have tried (`experiments/mixture`).

    Args:
        metric: the metric of the proxies, lower being better.
        log: regress the logarithm of the metric.
        candidates: mixtures drawn.
        keep: mixtures averaged.
        concentration: of the Dirichlet distribution of the candidates; lower spreads them more.
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
