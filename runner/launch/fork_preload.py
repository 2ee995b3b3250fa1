"""The imports of the fork server: everything that a cell needs, so that its child imports nothing.

It runs no parallel operation and touches no GPU: neither survives a fork.
"""

import pydantic.dataclasses  # noqa: F401
import torch._dynamo  # noqa: F401

import runner.data.tokens
import runner.launch.worker
import runner.learn.optim.groups
import runner.learn.tasks.language_modelling
import runner.work.evaluate
import runner.work.train  # noqa: F401
from models.decoder_config import DecoderConfig
from models.precision_config import PrecisionConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.data.tokens_config import DataConfig
from runner.evaluate.config import EvalConfig
from runner.grid.resources import ResourcesConfig
from runner.learn.config import TrainConfig
from runner.learn.optim.groups_config import AdamWConfig, MuonConfig
from runner.learn.optim.schedule import ScheduleConfig
from runner.learn.tasks.language_modelling_config import LanguageModellingConfig
from runner.machine.code import hashes
from runner.machine.environment import versions
from runner.machine.typed_json import adapter
from runner.records.config import RunConfig
from runner.views.mlflow_config import TrackConfig
from runner.work.config import EvaluateWork, TrainWork

_CONFIGS = (
    RunConfig,
    DecoderConfig,
    PrecisionConfig,
    DataConfig,
    TokenizerConfig,
    LanguageModellingConfig,
    AdamWConfig,
    MuonConfig,
    ScheduleConfig,
    TrainConfig,
    EvalConfig,
    TrackConfig,
    ResourcesConfig,
    TrainWork,
    EvaluateWork,
)
for _config in _CONFIGS:
    adapter(_config)
versions()
hashes(_config.__module__ for _config in _CONFIGS)
