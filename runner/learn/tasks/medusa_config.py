"""The config of training heads that tell tokens further ahead."""

from typing import TYPE_CHECKING, Any

from models.config import config
from models.medusa_config import MedusaConfig
from runner.learn.tasks.frozen_config import check_frozen
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.learn.tasks.medusa import MedusaTask
    from runner.records.config import RunConfig


@config
class MedusaTaskConfig:
    """Train the heads of model=medusa on the frozen run of the input named trunk.

    Validation logs the trunk's `val_loss`, `val_ahead_loss` over all heads (it chooses the best
    checkpoint), and of head k `val_ahead_accuracy_k`.

    Args:
        decay: head k has the weight decay^k in the loss (arXiv 2401.10774: 0.8).
    """

    decay: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"task.decay={self.decay} must be above 0 and at most 1")

    def check(self, run: "RunConfig") -> None:
        """Refuse another model, and a run without a trunk.

        Raises:
            ValueError: one of the two.
        """
        if not isinstance(run.model, MedusaConfig):
            raise ValueError(
                f"task=medusa trains heads ahead, and model={type(run.model).__name__} has none; "
                "use model=medusa"
            )
        if "trunk" not in run.inputs:
            raise ValueError(
                "task=medusa trains heads on a frozen run: name it as the input trunk, "
                "inputs.trunk.runs=[...] or from: {trunk: {stage: ...}}"
            )
        check_frozen("task=medusa", "trunk", run)

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "MedusaTask":
        """Return the task; the trunk of `model` gets the weights of the input."""
        from runner.learn.tasks.medusa import MedusaTask  # noqa: PLC0415

        return MedusaTask(self, model, tokenizer, inputs)
