"""What the fork server imports once: all that a cell needs, so that a forked child imports nothing.

It runs no parallel operation and touches no GPU: neither survives a fork.
"""

import pydantic.dataclasses  # noqa: F401
import torch._dynamo  # noqa: F401

import models.decoder
import models.precision
import runner.data.tokens
import runner.launch.worker
import runner.learn.config
import runner.learn.optim.groups
import runner.learn.optim.schedule
import runner.learn.tasks.language_modelling
import runner.learn.trainer
import runner.machine.environment
from runner.records.config import RunConfig, adapter

for _config in (
    RunConfig,
    models.decoder.DecoderConfig,
    models.precision.PrecisionConfig,
    runner.data.tokens.DataConfig,
    runner.data.tokenizers.TokenizerConfig,
    runner.learn.tasks.language_modelling.LanguageModellingConfig,
    runner.learn.optim.groups.AdamWConfig,
    runner.learn.optim.groups.MuonConfig,
    runner.learn.optim.schedule.ScheduleConfig,
    runner.learn.config.TrainConfig,
    runner.learn.config.EvalConfig,
    runner.learn.config.TrackConfig,
    runner.learn.config.ResourcesConfig,
):
    adapter(_config)
runner.machine.environment.versions()
