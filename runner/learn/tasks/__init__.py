"""Tasks: a task turns a batch into a loss. Each is one file here and one YAML in conf/task."""

__all__ = [
    "diffusion",
    "diffusion_config",
    "language_modelling",
    "language_modelling_config",
]
