"""Validation, benchmarks and further evaluations: during training, at its end, or afterwards.

A class with a `run` is an evaluation (`runner/records/contracts.py`) and may stand in `eval.also`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from models.config import any_configs, config, execution, neutral
from runner.records import contracts
from runner.records.contracts import Trained

Cadence = int | Literal["validation"] | None


@config
class HarnessConfig:
    """Benchmarks run by lm-eval: at the end of a run, every `every` steps, or on a finished run.

    Args:
        tasks: names of shipped tasks (lambada, arc_easy, blimp, ...), of tasks in `include`, or of
            lm-eval's own.
        every: steps between two evaluations (None: at the end only).
        data: a folder with the files of the shipped tasks (None: from the hub). Its content is
            hashed, its path is not.
        include: a folder of further task YAMLs.
        num_fewshot: worked examples before a question (None: the task's own number).
        fewshot_seed: seeds the choice of the worked examples.
        limit: the most questions of a task, evenly spaced through the file (None: all).
        context: the most tokens of a question and its answer; of longer ones the beginning is lost
            (None: train.sequence_length). A model that was fine-tuned on short sequences reads
            longer ones.
        steps, algorithm, block: of a model that fills in a canvas, see
            `runner.generate.denoising.Denoising`; they do nothing with another.
        batch_size: questions per forward pass.
        allow_unsafe_code: run a model's programs even without a sandbox.
    """

    tasks: tuple[str, ...] = ()
    every: int | None = None
    data: str | None = execution(None)
    include: str | None = execution(None)
    num_fewshot: int | None = None
    fewshot_seed: int = 1234
    limit: int | None = None
    context: int | None = neutral(None)
    steps: int | None = neutral(None)
    algorithm: str = neutral("entropy")
    block: int | None = neutral(None)
    batch_size: int = execution(16)
    allow_unsafe_code: bool = execution(False)

    @property
    def fill(self) -> dict[str, Any]:
        """The settings of a model that fills in a canvas."""
        return {"steps": self.steps, "algorithm": self.algorithm, "block": self.block}

    def context_in(self, run: Any) -> int:
        """Return the most tokens of a question and its answer in `run`."""
        return int(run.train.sequence_length if self.context is None else self.context)

    def check(self, run: Any) -> None:
        """Raise ValueError if the model of `run` does not read `context` tokens."""
        if self.context is None:
            return
        try:
            contracts.check(run.model, 1, self.context)
        except ValueError as error:
            raise ValueError(f"a benchmark's context={self.context}: {error}") from None

    def content_hash(self) -> str:
        """Return a hash of the YAMLs and files of the tasks, part of the fingerprint."""
        from runner.data import benchmark_files  # noqa: PLC0415

        return benchmark_files.content_hash(self.tasks, self.data, self.include)

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return the scores by task/metric, with known standard errors; write evals/."""
        from runner.evaluate.harness import run_benchmarks  # noqa: PLC0415

        return run_benchmarks(self, trained, step)

    def __post_init__(self) -> None:
        for name in ("every", "limit", "context", "batch_size", "steps", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"harness.{name}={value} must be at least 1")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"harness.tasks={list(self.tasks)} names a task twice")
        for name in ("data", "include"):  # a job may start in another directory
            if getattr(self, name):
                folder = Path(getattr(self, name)).expanduser().resolve()
                object.__setattr__(self, name, str(folder))


@config
class SamplesConfig:
    """A sample of text, drawn with the same seed each time and appended to samples.txt.

    Args:
        tokens: the length of the sample.
        prompt: the text that it continues.
        every: steps between two samples, or "validation": with each validation.
    """

    counts: ClassVar[bool] = False

    tokens: int = execution(128)
    prompt: str = execution("\n")
    every: Cadence = execution("validation")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `sample_repetition`, the fraction of the sample's 4-grams that are repeats."""
        from runner.evaluate.samples import sample  # noqa: PLC0415

        return sample(self, trained, step)


@config
class DetailsConfig:
    """Accuracy and calibration of next-token predictions; the loss by position (positions.json).

    Args:
        every: steps between them, `validation`: at each, or None: at the end.
    """

    counts: ClassVar[bool] = False

    every: Cadence = execution(None)

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `val_accuracy`, `val_calibration_error` and `state_bytes`.

        `state_bytes` is the size of one sequence's decoding state.
        """
        from runner.evaluate.details import write_details  # noqa: PLC0415

        return write_details(trained)


@config
class InductionConfig:
    """Prefix-matching scores of the heads on repeated random tokens, which show induction heads.

    Args:
        every: steps between them, `validation`: at each, or None: at the end.
    """

    counts: ClassVar[bool] = False

    every: Cadence = execution("validation")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `prefix_matching/LAYER.HEAD` and `repeat_gain`; see `internals.induction`."""
        from runner.evaluate.internals import induction  # noqa: PLC0415

        cfg = trained.cfg
        return induction(
            trained.model, trained.corpus.tokenizer.vocab_size, cfg.train.sequence_length // 2
        )


@config
class EvalConfig:
    """Validation every `every` steps and at the end, and further evaluations.

    The validation split is cut into windows of the training length, the last one shorter, of which
    evenly spaced ones are taken up to `tokens`.

    Args:
        every: steps between two validations.
        tokens: the most tokens of a validation.
        batch_size: windows per forward pass.
        harness: benchmarks that are part of the run: others make another run.
        also: further evaluations by name, each with its `_target_` (conf/eval/also). They are not
            part of the run: one added later is run without training again.
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
                    f"eval.also.{name}={evaluation!r} must have a method run(trained, step); "
                    "see conf/eval/also"
                )

    def further(self) -> dict[str, Any]:
        """Return the evaluations other than validation, by name."""
        benchmarks = {"benchmarks": self.harness} if self.harness.tasks else {}
        return benchmarks | self.also
