"""The config of summaries compared with references by ROUGE."""

from collections.abc import Mapping

from models.config import config, execution, neutral
from runner.evaluate.config import Cadence
from runner.records.contracts import Trained


@config
class RougeConfig:
    """Writes the solutions of held-out problems greedily and compares them with the references.

    Args:
        name: begins the names of the values, NAME/rouge1; differs from those of others.
        problems: the most problems, the first of the held-out split.
        max_new_tokens: the most tokens of a text; the sequence may leave fewer.
        stop: a text ends before the first of these strings.
        shots, shots_seed: worked examples before each problem, see `SolvingConfig`.
        rows: the most texts that are written at a time.
        every: steps between two evaluations, or "validation" (None: at the end).
    """

    name: str = "summaries"
    problems: int = 200
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    shots: int = neutral(0)
    shots_seed: int = neutral(0)
    rows: int = execution(64)
    every: Cadence = execution(None)

    def __post_init__(self) -> None:
        for name in ("problems", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return NAME/rouge1, NAME/rouge2, NAME/rougeLsum and NAME/tokens."""
        from runner.evaluate.rouge import summarise  # noqa: PLC0415

        return summarise(self, trained)
