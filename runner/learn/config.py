"""The config of training: batch, budget, and how it is executed.

Fields marked `execution` change no result and are not part of the fingerprint.
"""

from math import inf
from typing import Literal

from models.config import config, execution, neutral
from runner.learn.optim.average_config import AverageConfig
from runner.machine.errors import ConfigError


@config
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Args:
        every_steps: save every so many steps (None: by time alone).
        every_s: save after so many seconds.
        keep_last: keep this many of the newest.
        keep_best: keep the best by the task's measure.
        keep_every: keep those at multiples of so many steps (None: no others).
    """

    every_steps: int | None = None
    every_s: float = 300.0
    keep_last: int = 2
    keep_best: bool = True
    keep_every: int | None = None


@config
class TrainConfig:
    """Batch, budget and execution of a training run.

    Args:
        sequence_length: tokens per sample.
        batch_size: samples per optimiser step, over all ranks.
        steps, tokens, flops, tokens_per_parameter: the budget; at most one may be given, and none
            means 20 tokens per active parameter.
        clip: the largest gradient norm (None: no clipping).
        diverged_nats, diverged_window: the run ends as `diverged` when the median loss of the last
            `diverged_window` steps exceeds the lowest such median by more than `diverged_nats`.
        average: a running average of the weights, evaluated and saved beside them.
        micro_batch: samples per forward pass and rank (None: the rank's share of the batch).
        compile: compile the training step (torch.compile).
        activation_checkpointing: recompute the activations of each block in the backward pass.
        parallel: of several processes each holds the full model (ddp) or a shard of it (fsdp).
        profile: write a torch profiler trace of a few steps into the attempt's folder.
        deterministic: use deterministic kernels only (on a GPU; those of the CPU always are).
        device: where to train; `auto` is the GPU if there is one.
        threads: CPU threads (None: the launcher's share).
        log_every: steps between metric lines.
        checkpoint: when checkpoints are saved and which are kept.
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
        """Check the batch size and the budget.

        Raises:
            ConfigError: `processes` ranks cannot divide the batch into micro-batches, or a number
                is too small.
            ValueError: more than one budget is given.
        """
        for name in ("sequence_length", "batch_size", "micro_batch", "log_every", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"train.{name}={value} must be at least 1")
        for name in ("tokens", "flops", "tokens_per_parameter", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"train.{name}={value} must be positive and finite")
        micro = self.forward_samples(processes)
        if self.batch_size % (processes * micro):
            raise ConfigError(
                f"train.batch_size={self.batch_size} over {processes} processes is not divisible "
                f"into micro-batches of {micro}; choose train.batch_size and "
                "train.micro_batch that are"
            )
        names = ("steps", "tokens", "flops", "tokens_per_parameter")
        given = [f"train.{n}={getattr(self, n)}" for n in names if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one budget; set the others to null")

    def forward_samples(self, processes: int) -> int:
        """Return the number of samples in a forward pass of one of `processes` ranks."""
        share = max(1, self.batch_size // processes)
        return min(share, self.micro_batch or share)

    def num_steps(
        self, num_active_parameters: int, flops_per_sequence: int, sequences: int | None = None
    ) -> int:
        """Return the number of optimiser steps in the budget, at least 1.

        Args:
            sequences: of a step (None: one a sample).
        """
        batch = self.batch_size if sequences is None else sequences
        per_step = self.sequence_length * batch
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            steps = self.tokens / per_step
        elif self.flops is not None:
            steps = self.flops / (flops_per_sequence * batch)
        else:
            steps = (self.tokens_per_parameter or 20.0) * num_active_parameters / per_step
        return max(1, round(steps))
