"""The config of next-token prediction."""

from typing import TYPE_CHECKING, Any

from models.config import config
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.learn.tasks.language_modelling import LanguageModelling


@config
class LanguageModellingConfig:
    """Next-token prediction; it has no options."""

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "LanguageModelling":
        """Return the task."""
        from runner.learn.tasks.language_modelling import LanguageModelling  # noqa: PLC0415

        return LanguageModelling(tokenizer)
