"""Views of runs: plan, table, status page, disk usage, MLflow."""

__all__ = [
    "axes",
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
    "report_sections",
    "speed",
    "table",
    "tensorboard_files",
    "upload",
    "wandb_runs",
    "wrong_answers",
]
