"""Launching cells: local pool and SLURM backends, the worker, studies, policies, cancelling."""
