"""Where cells run: this machine's pool, SLURM; what a worker does; policies, studies, cancelling."""
