"""The config of next-token prediction."""

from typing import TYPE_CHECKING, Any

from models.config import config
from runner.data.corpus import prompt_sees_itself, refuse_several_sequences
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.learn.tasks.language_modelling import LanguageModelling


@config
class LanguageModellingConfig:
    """Next-token prediction; it has no options."""

    def check(self, run: Any) -> None:
        """Refuse judged answers, and tokens of a prompt that the model cannot let see each other.

        Raises:
            ValueError: one of the two.
        """
        refuse_several_sequences(run.data, "language_modelling")
        if getattr(run.data, "labelled", False):
            raise ValueError(
                "task=language_modelling would learn the wrong answers of data=solutions like the "
                "right ones; give task=verifier, or data=problems with the right ones"
            )
        if not prompt_sees_itself(run.data):
            return
        check_spans = getattr(run.model, "check_spans", None)
        if check_spans is None:
            raise ValueError(
                f"data.bidirectional_prompt=true needs a decoder of attention, and "
                f"{type(run.model).__name__} is none; use model=gpt_nano or the like"
            )
        check_spans()

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "LanguageModelling":
        """Return the task."""
        from runner.learn.tasks.language_modelling import LanguageModelling  # noqa: PLC0415

        return LanguageModelling(tokenizer)
