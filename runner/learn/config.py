"""The configs that belong to no single part: budget and execution of training, evaluation, tracking.

Which of these keys are science and which execution is listed in `runner/records/fingerprint.py`.
"""

from typing import Literal

from models.config import config, execution, neutral
from runner.learn.optim.average_config import AverageConfig
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
            per parameter (of experts and tables, those that a token meets).
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
    micro_batch: int | None = execution(None)
    compile: bool = execution(False)
    activation_checkpointing: bool = execution(False)
    parallel: Literal["ddp", "fsdp"] = execution("ddp")
    profile: bool = execution(False)
    deterministic: bool = execution(False)
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    threads: int | None = execution(None)
    log_every: int = execution(10)
    checkpoint: CheckpointConfig = execution(CheckpointConfig())

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
            "steps": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"train.{name}={value} must be at least {least}")

    def num_steps(self, num_active_parameters: int, flops_per_sequence: int) -> int:
        """Return the optimiser steps that the budget buys, at least 1."""
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
