"""The config of solving problems with more or less compute at test time."""

from collections.abc import Mapping
from typing import Any

from models.config import any_config, any_configs, config, execution, neutral
from runner.evaluate.config import Cadence
from runner.records.contracts import Trained


@config
class ForcedBudgets:
    """Budgets of thinking, each measured; see `runner.generate.budget_forcing`.

    Args:
        budgets: the most tokens of thinking, ascending.
        think_end, wait, waits, final, answer_tokens: see `BudgetForcing`.
    """

    budgets: tuple[int, ...]
    think_end: str
    wait: str = "Wait"
    waits: int = 0
    final: str = "Final Answer:"
    answer_tokens: int = 32

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"budgets={list(self.budgets)} must be numbers of tokens, at least 1")
        if not self.think_end:
            raise ValueError("think_end='' is empty; give the text that ends the thinking")
        if not 0 <= self.waits < 512:
            raise ValueError(f"waits={self.waits} must be in 0 to 511")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens={self.answer_tokens} must be at least 1")


@config
class SolvingConfig:
    """Solves the held-out problems of data=problems: greedily, by votes, by a verifier's choice.

    Args:
        name: begins the names of the values, NAME/greedy; differs from those of others.
        problems: the most problems, the first of the held-out split.
        samples: answers to each problem, beside the greedy one (0: that alone).
        max_new_tokens: the most tokens of an answer; the sequence may leave fewer.
        temperature, top_k: of the samples.
        stop: an answer ends before the first of these strings.
        seed: of the samples, whatever the run's.
        parser: finds the answer in a text, see `runner.data.answer_parsers` (None: the number
            after "####").
        shots: worked examples from the training set before each problem.
        shots_seed: of their choice, whatever the run's.
        tools: that the model may call while it writes, by name; see `runner.generate.tools`.
        scorer: chooses among the samples, see `runner.evaluate.scorers_config` (None: nobody does).
        thresholds: of the scorer: answers are drawn until one reaches it.
        forcing: measure the greedy answer at budgets of thinking.
        rows: the most answers that are generated at a time.
        every: steps between two evaluations, or "validation" (None: at the end).
    """

    name: str = "problems"
    problems: int = 200
    samples: int = 0
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    parser: Any = any_config()
    shots: int = neutral(0)
    shots_seed: int = neutral(0)
    tools: dict[str, Any] = any_configs()
    scorer: Any = any_config()
    thresholds: tuple[float, ...] = ()
    forcing: Any = any_config()
    rows: int = 512
    every: Cadence = execution(None)

    def __post_init__(self) -> None:
        for name in ("problems", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.shots < 0:
            raise ValueError(f"shots={self.shots} must be at least 0")
        if self.samples < 0 or self.temperature <= 0:
            raise ValueError(
                f"samples={self.samples} must be at least 0, temperature={self.temperature} above 0"
            )
        if self.scorer is not None and self.samples < 2:
            raise ValueError(
                f"a scorer chooses among samples, and samples={self.samples}; raise it"
            )
        if self.thresholds and self.scorer is None:
            raise ValueError(f"thresholds={list(self.thresholds)} are of a scorer; name one")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return accuracies by NAME/method; write answers_NAME.jsonl."""
        from runner.evaluate.solving import solve  # noqa: PLC0415

        return solve(self, trained)
