"""Where runs are shown."""

from models.config import config


@config
class TrackConfig:
    """Where runs are shown.

    Args:
        uri: MLflow tracking URI; None is the embedded SQLite store in `root`/mlflow; "off" is none.
        system_every_s: seconds between readings of memory, CPU and GPU.
    """

    uri: str | None = None
    system_every_s: float = 15.0
