"""The config of experiment tracking."""

import importlib.util
from typing import Literal

from models.config import config


@config
class TrackConfig:
    """Experiment tracking.

    Args:
        uri: MLflow tracking URI; None is the embedded SQLite store in `root`/mlflow, "off" none.
        also: further views that get the metrics: event files in `root`/tensorboard, runs of W&B in
            `root`/wandb (offline unless there is a key). Needs: pip install espalier[track]
        system_every_s: seconds between measurements of memory, CPU and GPU.
    """

    uri: str | None = None
    also: tuple[Literal["tensorboard", "wandb"], ...] = ()
    system_every_s: float = 15.0

    def __post_init__(self) -> None:
        for name in self.also:
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"also={list(self.also)}: {name} is not installed; pip install espalier[track]"
                )
