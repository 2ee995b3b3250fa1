"""Views of runs: plan, table, status page, disk usage, MLflow."""
