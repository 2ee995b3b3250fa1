"""The keys of `hydra.sweeper` and of `hydra.launcher` on this machine."""

from models.config import config
from runner.grid.language import Grid
from runner.launch.policy import Policy


@config
class LocalKeys:
    """Keys of `hydra.launcher` on this machine.

    Args:
        jobs: the most cells at a time (None: one for each GPU, else by cores).
    """

    jobs: int | None = None


@config
class GridKeys(Grid, Policy):
    """Keys of `hydra.sweeper`; overrides of the command line take precedence over the grid's.

    Args:
        filter: a condition on the points kept, see `runner/grid/expression.py`.
        dry_run: show the plan and run nothing (`espalier plan`).
        adopt: {run, reason}: bind a finished run to a new cell and run nothing (`espalier adopt`).
    """

    filter: str | None = None
    dry_run: bool = False
    adopt: dict[str, str] | None = None
