"""Evaluations of what a model knows of made-up people, and of what it has forgotten."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import any_config, config, execution, neutral
from runner.data.people_config import PeopleConfig
from runner.evaluate.config import Cadence
from runner.machine.errors import ConfigError
from runner.records.contracts import Trained


@config
class PeopleRecallConfig:
    """Exact recall of facts of data=people: greedy answers, with the database where it was trained.

    Args:
        every: steps between two evaluations, "validation", or None: at the end.
        num_people: the most people that are asked for; of more, the first so many.
        people: who they are, a node of data=people (None: those of the run).
        rows: questions that are answered at a time.
        answers: False generates nothing and measures teacher-forced values alone, `value_accuracy`,
            which takes a forward pass.
    """

    every: Cadence = execution(None)
    num_people: int = 2048
    people: Any = any_config()
    rows: int = execution(64)
    answers: bool = neutral(True)

    def __post_init__(self) -> None:
        for name in ("num_people", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `recall` and its parts; see `runner.evaluate.people_recall`."""
        from runner.evaluate.people_recall import measure_recall  # noqa: PLC0415

        return measure_recall(self, trained)


@config
class CapacityConfig:
    """Bits that a model has learnt of biographies, and bits per parameter.

    Args:
        every: steps between two evaluations, "validation", or None: at the end.
        num_people: the most people that are measured; of more, the first so many.
        people: who they are, a node of data=people (None: those of the run).
        batch_size: biographies in a forward pass.
    """

    every: Cadence = execution(None)
    num_people: int = 4096
    people: Any = any_config()
    batch_size: int = execution(64)

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `names_nats` (p1), `values_nats` (p2), `value_recall`, `bits` and others.

        See `runner.evaluate.capacity.measure_capacity`.
        """
        from runner.evaluate.capacity import measure_capacity  # noqa: PLC0415

        return measure_capacity(self, trained)


def people_of(cfg: PeopleRecallConfig | CapacityConfig, trained: Trained) -> PeopleConfig:
    """Return the people of an evaluation.

    Raises:
        ConfigError: none are given, and the run has none.
    """
    people = trained.cfg.data if cfg.people is None else cfg.people
    if not isinstance(people, PeopleConfig):
        raise ConfigError(
            f"{type(cfg).__name__} needs made-up people, and the run has data "
            f"{type(people).__name__}; use data=people, or give the evaluation its own: "
            "people={_target_: runner.data.people_config.PeopleConfig, ...}"
        )
    return people


@config
class ForgettingConfig:
    """What fine-tuning has changed beside what it taught: divergence from the model of `init`.

    Args:
        prompts: a .jsonl(.gz) or .json file of rows with an `instruction`.
        text: a text file, of whose first `text_tokens` ids the loss is measured (None: of none).
        tokens: of an answer; the model of `init` gives it, greedily.
        every: steps between two evaluations, "validation", or None: at the end.
        num_prompts: how many of the prompts are answered.
        text_tokens: ids of `text` whose loss is measured.
        rows: answers that are generated at a time.
    """

    prompts: str
    text: str | None = None
    tokens: int = 32
    num_prompts: int = 110
    text_tokens: int = 1024
    every: Cadence = execution(None)
    rows: int = execution(16)

    def __post_init__(self) -> None:
        for name in ("prompts", "text"):  # a job may start in another directory
            if getattr(self, name):
                path = Path(getattr(self, name)).expanduser().resolve()
                object.__setattr__(self, name, str(path))
        for name in ("tokens", "num_prompts", "text_tokens", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `kl_to_start` and others; see `runner.evaluate.forgetting`."""
        from runner.evaluate.forgetting import measure_forgetting  # noqa: PLC0415

        return measure_forgetting(self, trained)
