"""What the fork server imports once: all that a cell needs, so that a forked child imports nothing.

It runs no parallel operation and touches no GPU: neither survives a fork.
"""

import pydantic.dataclasses  # noqa: F401
import torch._dynamo  # noqa: F401

import models.decoder
import models.precision
import runner.data.tokens
import runner.environment
import runner.optim.groups
import runner.optim.schedule
import runner.settings
import runner.tasks.language_modelling
import runner.train
import runner.worker
from runner.config import RunConfig, adapter

for _config in (
    RunConfig,
    models.decoder.DecoderConfig,
    models.precision.PrecisionConfig,
    runner.data.tokens.DataConfig,
    runner.data.tokenizers.TokenizerConfig,
    runner.tasks.language_modelling.LanguageModellingConfig,
    runner.optim.groups.AdamWConfig,
    runner.optim.groups.MuonConfig,
    runner.optim.schedule.ScheduleConfig,
    runner.settings.TrainConfig,
    runner.settings.EvalConfig,
    runner.settings.TrackConfig,
    runner.settings.ResourcesConfig,
):
    adapter(_config)
runner.environment.versions()
