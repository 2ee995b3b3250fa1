"""Import paths of classes and functions that have moved: path of the first release -> current path.

Applied where a path is read (a `_target_`, a `!function` of a benchmark) and inverted where a
fingerprint is taken, so that a run keeps its name when code moves. Entries are never removed; when
something moves again, only its right side changes.
"""

MOVED: dict[str, str] = {
    "models.attention.AttentionConfig": "models.attention_config.AttentionConfig",
    "models.layers.FeedForwardConfig": "models.layers_config.FeedForwardConfig",
    "models.experts.ExpertsConfig": "models.experts_config.ExpertsConfig",
    "models.linear_attention.LinearAttentionConfig": (
        "models.linear_attention_config.LinearAttentionConfig"
    ),
    "models.mamba.MambaConfig": "models.mamba_config.MambaConfig",
    "models.min_gru.MinGRUConfig": "models.min_gru_config.MinGRUConfig",
    "models.convolution.ConvolutionConfig": "models.convolution_config.ConvolutionConfig",
    "models.engram.EngramConfig": "models.engram_config.EngramConfig",
    "models.bdh.BDHConfig": "models.bdh_config.BDHConfig",
    "models.streams.StreamsConfig": "models.streams_config.StreamsConfig",
    "models.decoder.DecoderConfig": "models.decoder_config.DecoderConfig",
    "models.ngram.NgramConfig": "models.ngram_config.NgramConfig",
    "models.precision.PrecisionConfig": "models.precision_config.PrecisionConfig",
    "runner.data.tokenizers.TokenizerConfig": "runner.data.tokenizers_config.TokenizerConfig",
    "runner.data.tokens.DataConfig": "runner.data.tokens_config.DataConfig",
    "runner.data.markov.MarkovConfig": "runner.data.markov_config.MarkovConfig",
    "runner.data.recall.RecallConfig": "runner.data.recall_config.RecallConfig",
    "runner.optim.groups.AdamWConfig": "runner.learn.optim.groups_config.AdamWConfig",
    "runner.optim.groups.MuonConfig": "runner.learn.optim.groups_config.MuonConfig",
    "runner.optim.schedule.ScheduleConfig": "runner.learn.optim.schedule.ScheduleConfig",
    "runner.settings.EvalConfig": "runner.evaluate.config.EvalConfig",
    "runner.settings.ResourcesConfig": "runner.grid.resources.ResourcesConfig",
    "runner.settings.TrackConfig": "runner.views.mlflow_config.TrackConfig",
    "runner.settings.TrainConfig": "runner.learn.config.TrainConfig",
    "runner.tasks.language_modelling.LanguageModellingConfig": (
        "runner.learn.tasks.language_modelling_config.LanguageModellingConfig"
    ),
    "runner.evals.code.humaneval": "runner.evaluate.code_execution.humaneval",
    "runner.evals.code.mbpp": "runner.evaluate.code_execution.mbpp",
    **{
        f"runner.evals.prompts.{name}": f"runner.evaluate.benchmark_rows.{name}"
        for name in (
            "hellaswag_endings",
            "hellaswag_query",
            "mbpp_splits",
            "winogrande_answer",
            "winogrande_contexts",
            "winogrande_continuation",
        )
    },
}


def current_path(path: str) -> str:
    """Return the current import path of the class or function that `path` names or has named."""
    return MOVED.get(path, path)


def released_path(path: str) -> str:
    """Return the import path of the first release of the class or function now at `path`."""
    return next((old for old, new in MOVED.items() if new == path), path)


def with_released_paths(text: str) -> str:
    """Return `text` with every moved path replaced by that of its first release."""
    for old, new in MOVED.items():
        text = text.replace(new, old)
    return text
