"""Tasks: a task turns a batch into a loss. Each is one file here and one YAML in conf/task."""

__all__ = [
    "diffusion",
    "diffusion_config",
    "diffusion_infill",
    "diffusion_infill_config",
    "distillation",
    "distillation_config",
    "frozen",
    "frozen_config",
    "grpo",
    "grpo_config",
    "grpo_loss",
    "language_modelling",
    "language_modelling_config",
    "medusa",
    "medusa_config",
    "preference",
    "preference_config",
    "preference_losses",
    "verifier",
    "verifier_config",
]
