"""What is measured of a model: while it trains, at its end, beside it or after it.

Each class that has a `run` is an evaluation (`runner/records/contracts.py`); it may stand in `eval.also`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from models.config import any_configs, config, execution, neutral
from runner.records.contracts import Trained

Cadence = int | Literal["validation"] | None


@config
class HarnessConfig:
    """Benchmarks, asked by lm-eval at the end of a run, every so many steps, or of a finished run.

    Args:
        tasks: names: shipped (lambada, arc_easy, blimp, ...), of `include`, or lm-eval's own.
        every: steps between (None: at the end only).
        data: folder with the files of the shipped ones (None: from the hub); its content counts, not its path.
        include: folder of further task YAMLs.
        num_fewshot: worked examples before a question (None: as the task has it), drawn by `fewshot_seed`.
        limit: questions of each task at most, evenly spaced (None: all).
        batch_size: questions at once.
        allow_unsafe_code: run a model's programs even where there is no sandbox.
    """

    tasks: tuple[str, ...] = ()
    every: int | None = None
    data: str | None = execution(None)
    include: str | None = execution(None)
    num_fewshot: int | None = None
    fewshot_seed: int = 1234
    limit: int | None = None
    batch_size: int = execution(16)
    allow_unsafe_code: bool = execution(False)

    def content_hash(self) -> str:
        """Return a hash of the YAMLs and files that the tasks read: where they change, so does the evaluation."""
        from runner.data import benchmark_files  # noqa: PLC0415

        return benchmark_files.content_hash(self.tasks, self.data, self.include)

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return the scores by task/metric, standard errors where they are known; the report goes to evals/."""
        from runner.evaluate.harness import ask_benchmarks  # noqa: PLC0415

        return ask_benchmarks(self, trained, step)

    def __post_init__(self) -> None:
        for name in ("every", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"harness.{name}={value} must be at least 1")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"harness.tasks={list(self.tasks)} names a task twice")
        for name in ("data", "include"):  # a job may start in another directory
            if getattr(self, name):
                object.__setattr__(
                    self, name, str(Path(getattr(self, name)).expanduser().resolve())
                )


@config
class SamplesConfig:
    """A sample of text, the same random draws each time: samples.txt.

    Args:
        tokens: its length; prompt: what it continues.
    """

    counts: ClassVar[bool] = False

    tokens: int = execution(128)
    prompt: str = execution("\n")
    every: Cadence = execution("validation")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `sample_repetition`, the share of 4-grams that the sample has said before."""
        from runner.evaluate.samples import sample  # noqa: PLC0415

        return sample(self, trained, step)


@config
class DetailsConfig:
    """Accuracy and calibration of the next token, and positions.json: the loss at each position of a sequence."""

    counts: ClassVar[bool] = False

    every: Cadence = execution(None)

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `val_accuracy`, `val_calibration_error` and `state_bytes`, a sequence's state in decoding."""
        from runner.evaluate.details import write_details  # noqa: PLC0415

        return write_details(trained)


@config
class InductionConfig:
    """Signs of induction heads on random tokens said twice: prefix_matching/LAYER.HEAD and repeat_gain."""

    counts: ClassVar[bool] = False

    every: Cadence = execution("validation")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return them; see `runner/evaluate/internals.py`."""
        from runner.evaluate.internals import induction  # noqa: PLC0415

        cfg = trained.cfg
        return induction(
            trained.model, trained.corpus.tokenizer.vocab_size, cfg.train.sequence_length // 2
        )


@config
class EvalConfig:
    """Validation: every so many steps (and at the end) on at most `tokens` tokens; and what else is measured.

    The split is cut into windows of the training length, the last one shorter, evenly thinned out
    to `tokens`.

    Args:
        harness: benchmarks that are part of the run: with others it is another run.
        also: further evaluations by name, each with its `_target_`: conf/eval/also. They are no part of the run:
            one that is added later is made up for without training again.
    """

    numerics = 2  # 1 left the last, shorter window of the split out

    every: int = 100
    tokens: int = 65536
    batch_size: int = execution(16)
    harness: HarnessConfig = neutral(HarnessConfig())
    also: dict[str, Any] = any_configs()

    def __post_init__(self) -> None:
        for name in ("every", "tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name}={getattr(self, name)} must be at least 1")
        for name, evaluation in self.also.items():
            if not callable(getattr(evaluation, "run", None)):
                raise ValueError(
                    f"eval.also.{name}={evaluation!r} has no run(trained, step): see conf/eval/also"
                )

    def further(self) -> dict[str, Any]:
        """Return all evaluations but validation, by name."""
        benchmarks = {"benchmarks": self.harness} if self.harness.tasks else {}
        return benchmarks | self.also
