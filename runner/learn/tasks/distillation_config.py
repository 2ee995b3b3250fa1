"""The config of distillation."""

from typing import TYPE_CHECKING, Any, Literal

from models.config import config
from runner.data.corpus import refuse_several_sequences
from runner.learn.tasks.frozen_config import check_frozen
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.learn.tasks.distillation import Distillation
    from runner.records.config import RunConfig


@config
class DistillationConfig:
    """Make a model predict what a frozen teacher predicts, at every target of the data.

    The teacher's products are in no quantised format whatever the precision: with
    precision=nvfp4 and teacher=init a model learns to be quantised (quantisation-aware
    distillation). Validation logs `val_divergence` (it chooses the best checkpoint), `val_loss`,
    `val_teacher_loss` and the share of targets at which both have the same likeliest token.

    Args:
        teacher: the name of an input; `init` is what this run starts from.
        divergence: see `kernels/divergence.py`.
        top_k: tokens of the teacher that divergence=top_k tells apart.
        temperature: divides the logits of both.
        lm_weight: of next-token prediction beside it.
    """

    teacher: str = "teacher"
    divergence: Literal["forward", "reverse", "top_k"] = "forward"
    top_k: int = 64
    temperature: float = 1.0
    lm_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"task.top_k={self.top_k} must be at least 1")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"task.temperature={self.temperature} must be positive and finite")
        if self.lm_weight < 0:
            raise ValueError(f"task.lm_weight={self.lm_weight} must be at least 0")

    def check(self, run: "RunConfig") -> None:
        """Refuse a teacher that is not there, and data whose samples hold several sequences.

        Raises:
            ValueError: one of the two.
        """
        refuse_several_sequences(run.data, "distillation")
        if self.teacher not in run.inputs and not (self.teacher == "init" and run.init):
            raise ValueError(
                f"task.teacher={self.teacher}: there is no such input (there are: "
                f"{', '.join(run.inputs) or 'none'}); name a trained run in inputs, or give "
                "init=hf:DIR and task.teacher=init"
            )
        check_frozen(f"task.teacher={self.teacher}", self.teacher, run)

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "Distillation":
        """Return the task."""
        from runner.learn.tasks.distillation import Distillation  # noqa: PLC0415

        return Distillation(self, model, tokenizer, inputs)
