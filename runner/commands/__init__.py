"""The verbs of the command line, and Hydra's side of a run."""
