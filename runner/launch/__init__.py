"""Launching cells: local pool and SLURM backends, the worker, studies, policies, cancelling."""

__all__ = [
    "after_exit",
    "backend",
    "backends",
    "cancel",
    "fork_preload",
    "fork_server",
    "launch",
    "local",
    "mlflow_process",
    "policy",
    "pool",
    "single",
    "slurm",
    "slurm_job",
    "slurm_limit",
    "slurm_script",
    "snapshot",
    "study",
    "worker",
]
