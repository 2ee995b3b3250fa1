"""Runs of W&B, offline unless there is a key: `wandb sync wandb/offline-run-*` uploads them.

wandb/wandb/offline-run-<time>-<id>    a session; W&B joins those of one id
"""

import os
import shutil
import warnings
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from runner.views.mlflow_points import Point
from runner.views.other_views import ShownRun

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    import wandb

_STEP = "trainer/step"


class WandbSession:
    """A run of W&B, which saves when it ends: until then `saved` returns None.

    A row's step at W&B is its number, which only rises; so a server leaves out a row sent twice.
    """

    def __init__(self, run: Any, earlier: dict[str, Any]) -> None:
        self._run, self._rows = run, int(earlier.get("rows", 0))
        self._finished = list(earlier.get("finished", []))

    def write(self, points: list[Point]) -> None:
        """See `Session`."""
        for (step, time_ms), row in groupby(points, key=lambda point: point[1:3]):
            values = {key: value for key, _, _, value in row}
            axes = {_STEP: step, "_timestamp": time_ms / 1000}
            self._run.log(values | axes, step=self._rows)
            self._rows += 1

    def saved(self) -> None:
        """See `Session`."""

    def end(self, state: str) -> dict[str, Any]:
        """See `Session`."""
        folder = Path(self._run.dir).parent.name
        self._run.finish(exit_code=int(state in ("failed", "diverged")))
        return {"rows": self._rows, "finished": [*self._finished, folder]}


def open_session(run: ShownRun, saved: dict[str, Any] | None) -> WandbSession:
    """Return a session of a run; what an earlier process has not finished is deleted."""
    folder, earlier = run.root / "wandb", saved or {}
    folder.mkdir(exist_ok=True)
    key = sha256(f"{run.sweep} {run.fingerprint}".encode()).hexdigest()[:16]
    for begun in (folder / "wandb").glob(f"offline-run-*-{key}"):
        if begun.name not in earlier.get("finished", []):
            shutil.rmtree(begun)
    settings = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True
    )
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    wandb_run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or run.sweep,
        group=run.sweep,
        id=key,
        name=run.label,
        dir=str(folder),
        mode=mode,
        resume="allow",
        reinit="create_new",
        config=dict(run.params) | {"fingerprint": run.fingerprint},
        settings=settings,
    )
    wandb_run.define_metric(_STEP, hidden=True)
    wandb_run.define_metric("*", step_metric=_STEP)
    return WandbSession(wandb_run, earlier)
