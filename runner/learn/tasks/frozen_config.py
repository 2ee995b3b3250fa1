"""What configs check of a model that a task keeps beside its own (`runner.learn.tasks.frozen`)."""

from typing import TYPE_CHECKING

from models.config import released_name
from runner.records.earlier_configs import EVALUATE

if TYPE_CHECKING:
    from runner.records.config import RunConfig


def check_frozen(setting: str, name: str, run: "RunConfig") -> None:
    """Refuse to train beside the input `name` where its averaged weights are taken.

    Raises:
        ValueError: they are; `setting` is the key and value that need the input.
    """
    given = run.inputs.get(name)
    trains = released_name(type(run.work)) != EVALUATE  # there init is the run evaluated
    if given is not None and given.take == "average" and trains:
        raise ValueError(
            f"{setting}: the model of input {name} is kept beside the one that learns with its "
            f"newest weights, and inputs.{name}.take=average has others; give take=weights"
        )
