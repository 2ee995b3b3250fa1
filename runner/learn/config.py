"""The configs that belong to no single part: budget and execution of training, evaluation, tracking.

Which of these keys are science and which execution is listed in `runner/records/fingerprint.py`.
"""

from pathlib import Path
from typing import Literal

from models.config import config, neutral
from runner.learn.optim.average import AverageConfig
from runner.machine.errors import ConfigError


@config
class CheckpointConfig:
    """When to save, what to keep: `keep_last` newest, the best by validation loss, every K steps."""

    every_steps: int | None = None
    every_s: float = 300.0
    keep_last: int = 2
    keep_best: bool = True
    keep_every: int | None = None


@config
class TrainConfig:
    """The training run.

    Args:
        sequence_length: tokens per sample; batch_size: samples per optimiser step, over all ranks.
        steps, tokens, flops, tokens_per_parameter: the budget, at most one; none means 20 tokens
            per parameter (of experts and tables, those that a token meets). steps=0 only evaluates: with `upstream`, a finished run on other data.
        clip: largest gradient norm (None: no clipping).
        diverged_nats, diverged_window: the run ends as `diverged` where the median loss of a window
            of steps lies so far above the best such median.
        micro_batch: samples per forward pass and rank (None: all at once).
        log_every: steps between metric lines.
        threads: CPU threads (None: what the launcher gives).
        average: a running average of the weights, evaluated and saved beside them.
        deterministic: refuse kernels that may differ from run to run (on a GPU; the CPU's never do).
        parallel: with several processes, each holds the model (ddp) or a share of it (fsdp).
        profile: write a torch profiler trace of a few steps into the attempt's folder.
    """

    sequence_length: int = 256
    batch_size: int = 16
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    tokens_per_parameter: float | None = None
    clip: float | None = 1.0
    diverged_nats: float = 1.5
    diverged_window: int = 50
    average: AverageConfig = neutral(AverageConfig())
    micro_batch: int | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    profile: bool = False
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    log_every: int = 10
    checkpoint: CheckpointConfig = CheckpointConfig()

    def check(self, processes: int) -> None:
        """Raise ConfigError on a batch that `processes` ranks cannot divide or on two budgets."""
        share = self.batch_size // processes
        micro = min(share, self.micro_batch or share)
        if self.batch_size % processes or share % micro:
            raise ConfigError(
                f"train.batch_size={self.batch_size} over {processes} processes is not divisible into "
                f"micro-batches of {micro or 1}; choose train.batch_size and train.micro_batch that are"
            )
        names = ("steps", "tokens", "flops", "tokens_per_parameter")
        given = [f"train.{n}={getattr(self, n)}" for n in names if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one budget; set the others to null")
        for name, least in {
            "sequence_length": 1,
            "batch_size": 1,
            "log_every": 1,
            "steps": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"train.{name}={value} must be at least {least}")

    def num_steps(self, num_active_parameters: int, flops_per_sequence: int) -> int:
        """Return the optimiser steps that the budget buys, at least 1; `steps` itself may be 0."""
        per_step = self.sequence_length * self.batch_size
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            steps = self.tokens / per_step
        elif self.flops is not None:
            steps = self.flops / (flops_per_sequence * self.batch_size)
        else:
            steps = (self.tokens_per_parameter or 20.0) * num_active_parameters / per_step
        return max(1, round(steps))


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
    include: str | None = None
    num_fewshot: int | None = None
    fewshot_seed: int = 1234
    limit: int | None = None
    batch_size: int = 16
    follow: bool = False
    allow_unsafe_code: bool = False

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
    batch_size: int = 16
    sample_tokens: int = 128
    prompt: str = "\n"
    harness: HarnessConfig = neutral(HarnessConfig())
    details: bool = False
    induction: bool = False


@config
class TrackConfig:
    """Where runs are shown.

    Args:
        uri: MLflow tracking URI; None is the embedded SQLite store in `root`/mlflow; "off" is none.
        system_every_s: seconds between readings of memory, CPU and GPU.
    """

    uri: str | None = None
    system_every_s: float = 15.0


@config
class ResourcesConfig:
    """What one cell needs; `resources.classes` sets it by the config, see `runner/grid/resources.py`.

    Args:
        gpus: GPUs on each node (None: one where this machine has any, none on SLURM).
        processes: ranks on each node (None: one for each GPU).
        nodes: above 1 on SLURM only.
        gpu: its name, "A100": format and memory are checked against it, and time is told by it.
        cpus, mem_gb: cores and memory on each node, asked of SLURM (mem_gb None: its default).
        timeout_min: time limit of a SLURM job; a cell may take several of them.
        hang_min: a cell without a new step for so long is stopped and failed (None: never).
        halve_on_oom: after out of memory, try again with half the micro-batch, at equal tokens a step.
    """

    gpus: int | None = None
    gpu: str | None = None
    processes: int | None = None
    nodes: int = 1
    cpus: int = 1
    mem_gb: float | None = None
    timeout_min: int = 60
    hang_min: float | None = 30.0
    halve_on_oom: bool = True

    def __post_init__(self) -> None:
        for name in ("processes", "nodes", "cpus", "timeout_min"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"resources.{name}={value} must be at least 1")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"resources.gpus={self.gpus} must not be negative")

    @property
    def per_node(self) -> int:
        """Ranks on each node, the default resolved."""
        return self.processes or max(1, self.gpus or 1)

    @property
    def num_processes(self) -> int:
        """Ranks in all."""
        return self.nodes * self.per_node
