"""The verbs of the command line, and Hydra's side of a run."""

__all__ = [
    "arguments",
    "choices",
    "cli",
    "completion",
    "composer",
    "exchange",
    "figures",
    "generation_cli",
    "hydra_plugin",
    "key_reference",
    "keys",
    "missing_values",
    "models",
    "names",
    "overrides",
    "precision",
    "refusals",
    "storage",
    "sweep_keys",
    "sweep_schema",
]
