"""The config of experiment tracking."""

from models.config import config


@config
class TrackConfig:
    """Experiment tracking.

    Args:
        uri: MLflow tracking URI; None is the embedded SQLite store in `root`/mlflow, "off" none.
        system_every_s: seconds between measurements of memory, CPU and GPU.
    """

    uri: str | None = None
    system_every_s: float = 15.0
