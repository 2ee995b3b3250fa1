"""What is shown of runs: plan, table, page, disk, MLflow."""
