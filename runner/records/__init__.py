"""What stands on the disk: configs, cells, fingerprints, journals, checkpoints, failures."""

__all__ = [
    "adopt",
    "archive",
    "budget",
    "cells",
    "checkpoint",
    "checkpoint_folder",
    "config",
    "contracts",
    "difference",
    "drift",
    "earlier_configs",
    "failures",
    "fingerprint",
    "inputs",
    "journal",
    "metrics",
    "new_checkpoints",
    "run_data",
    "slurm_queue",
    "trained_model",
]
