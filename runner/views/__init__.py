"""Views of runs: plan, table, status page, disk usage, MLflow."""

__all__ = [
    "describe",
    "disk",
    "mlflow",
    "mlflow_config",
    "mlflow_cursors",
    "mlflow_page",
    "mlflow_points",
    "mlflow_runs",
    "other_views",
    "plan",
    "precision_table",
    "report",
    "speed",
    "table",
    "tensorboard_files",
    "upload",
    "wandb_runs",
]
