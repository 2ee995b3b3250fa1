"""The config of looking at held-out pairs of answers one by one."""

from collections.abc import Mapping

from models.config import config, execution
from runner.evaluate.config import Cadence
from runner.records.contracts import Trained


@config
class PairsConfig:
    """Writes out the margin of each held-out pair of task=preference.

    Args:
        name: begins the names of the values, NAME/violations; differs from those of others.
        limit: the most pairs, the first of the held-out split.
        every: steps between two evaluations, or "validation" (None: at the end).
    """

    name: str = "pairs"
    limit: int = 1000
    every: Cadence = execution(None)

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return NAME/violations, the share of pairs in the wrong order, and NAME/margin."""
        from runner.evaluate.pairs import look_at_pairs  # noqa: PLC0415

        return look_at_pairs(self, trained)
