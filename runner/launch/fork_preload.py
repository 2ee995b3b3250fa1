"""What the fork server imports once: all that a cell needs, so that a forked child imports nothing.

It runs no parallel operation and touches no GPU: neither survives a fork.
"""

import pydantic.dataclasses  # noqa: F401
import torch._dynamo  # noqa: F401

import models.decoder
import models.precision
import runner.data.tokens
import runner.evaluate.config
import runner.grid.resources
import runner.launch.worker
import runner.learn.config
import runner.learn.optim.groups
import runner.learn.optim.schedule
import runner.learn.tasks.language_modelling
import runner.learn.trainer
import runner.machine.environment
import runner.views.mlflow_config
from runner.records.config import RunConfig, adapter

for _config in (
    RunConfig,
    models.decoder_config.DecoderConfig,
    models.precision_config.PrecisionConfig,
    runner.data.tokens.DataConfig,
    runner.data.tokenizers.TokenizerConfig,
    runner.learn.tasks.language_modelling.LanguageModellingConfig,
    runner.learn.optim.groups.AdamWConfig,
    runner.learn.optim.groups.MuonConfig,
    runner.learn.optim.schedule.ScheduleConfig,
    runner.learn.config.TrainConfig,
    runner.evaluate.config.EvalConfig,
    runner.views.mlflow_config.TrackConfig,
    runner.grid.resources.ResourcesConfig,
):
    adapter(_config)
runner.machine.environment.versions()
