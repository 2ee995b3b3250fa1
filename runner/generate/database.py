"""The database of data=people as a tool: what the people of a run are, and nobody else."""

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from models.config import any_config, config
from runner.data.people_config import PeopleConfig

if TYPE_CHECKING:
    from runner.data.people import People


@config
class DatabaseConfig:
    """Answers turns of the form `<find> attribute ; name`.

    Args:
        people: whose values it knows, a node of data=people (None: those of the run).
        timeout_s: seconds to wait for an answer.
    """

    people: Any = any_config()
    timeout_s: float = 3.0

    def for_run(self, run: Any) -> "DatabaseConfig":
        """Return the database of a run, unless its people are given.

        Raises:
            ValueError: the data of the run are no people.
        """
        if self.people is not None:
            return self
        if not isinstance(run.data, PeopleConfig):
            raise ValueError(
                f"the run has data {type(run.data).__name__} and no people to look up; give the "
                "tool its own: people={_target_: runner.data.people_config.PeopleConfig, ...}"
            )
        return replace(self, people=run.data)

    def claims(self, text: str) -> bool:
        """Return whether a turn asks the database."""
        from runner.data.people import asked_for  # noqa: PLC0415  (imports torch)

        return asked_for(text) is not None

    def __call__(self, text: str) -> str:
        """Return the value that a call asks for, or that there is none."""
        return _people(self.people).find(text)


@lru_cache(maxsize=4)
def _people(cfg: PeopleConfig) -> "People":
    from runner.data.people import People  # noqa: PLC0415  (imports torch)

    return People(cfg)
