"""What is measured of a model while it trains and after."""

from pathlib import Path

from models.config import config, execution, neutral


@config
class HarnessConfig:
    """Benchmarks, asked by lm-eval at the end of a run, every so many steps, or of a finished run.

    Args:
        tasks: names: shipped (lambada, arc_easy, blimp, ...), of `include`, or lm-eval's own.
        every: steps between (None: at the end only).
        data: folder with the files of the shipped ones (None: from the hub).
        include: folder of further task YAMLs.
        num_fewshot: worked examples before a question (None: as the task has it), drawn by `fewshot_seed`.
        limit: questions of each task at most, evenly spaced (None: all).
        batch_size: questions at once.
        follow: of `espalier eval`: evaluate each checkpoint of a run that still trains as it comes.
        allow_unsafe_code: run a model's programs even where there is no sandbox.
    """

    tasks: tuple[str, ...] = ()
    every: int | None = None
    data: str | None = None
    include: str | None = execution(None)
    num_fewshot: int | None = None
    fewshot_seed: int = 1234
    limit: int | None = None
    batch_size: int = execution(16)
    follow: bool = execution(False)
    allow_unsafe_code: bool = execution(False)

    def content_hash(self) -> str:
        """Return a hash of the YAMLs and files that the tasks read: where they change, so does the evaluation."""
        from runner.data import benchmark_files  # noqa: PLC0415

        return benchmark_files.content_hash(self.tasks, self.data, self.include)

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
class EvalConfig:
    """Validation during training: every so many steps (and at the end) on at most `tokens` tokens.

    The split is cut into windows of the training length, the last one shorter, evenly thinned out
    to `tokens`.

    Args:
        sample_tokens: length of the text generated at each evaluation (0: none).
        harness: benchmarks.
        details: at the end also accuracy and calibration of the next token, and positions.json: the loss at
            each position of a sequence.
        induction: at each evaluation prefix_matching/LAYER.HEAD and repeat_gain on random tokens said twice; see
            `runner/evaluate/internals.py`.
    """

    numerics = 2  # 1 left the last, shorter window of the split out

    every: int = 100
    tokens: int = 65536
    batch_size: int = execution(16)
    sample_tokens: int = execution(128)
    prompt: str = execution("\n")
    harness: HarnessConfig = neutral(HarnessConfig())
    details: bool = execution(False)
    induction: bool = execution(False)
