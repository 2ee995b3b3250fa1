"""What is learnt: a task turns a batch into a loss. One file here and one YAML per task."""
