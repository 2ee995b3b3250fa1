"""The config of comparing answers with those of the model that training started from."""

from collections.abc import Mapping
from typing import Any

from models.config import any_config, config, execution
from runner.evaluate.config import Cadence
from runner.records.contracts import Trained


@config
class WinRateConfig:
    """Answers held-out prompts of data=preferences, by the model and by the one it started from.

    Args:
        name: begins the names of the values, NAME/wins; differs from those of others.
        prompts: the most prompts, the first of the held-out split.
        max_new_tokens: the most tokens of an answer; the sequence may leave fewer.
        scorer: judges the answers, see `runner.evaluate.scorers_config`.
        rows: the most answers that are generated at a time.
        every: steps between two evaluations, or "validation" (None: at the end).
    """

    name: str = "win_rate"
    prompts: int = 64
    max_new_tokens: int = 128
    scorer: Any = any_config()
    rows: int = execution(16)
    every: Cadence = execution(None)

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not hasattr(self.scorer, "build"):
            raise ValueError(
                f"scorer={self.scorer!r} judges no answers; add +scorer@eval.also.{self.name}"
                ".scorer=verifier and the verifier as an input of the run"
            )

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return NAME/wins and others; see `runner.evaluate.win_rate`."""
        from runner.evaluate.win_rate import compare_answers  # noqa: PLC0415

        return compare_answers(self, trained)
