"""The config of learning from preferences."""

from typing import TYPE_CHECKING, Any, Literal

from models.config import config
from runner.learn.tasks.frozen_config import check_frozen
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.learn.tasks.preference import Preference
    from runner.records.config import RunConfig

Loss = Literal["dpo", "dpo_normalised", "hinge", "ipo", "ipo_normalised", "simpo", "orpo", "kto"]
_NORMALISED = "_normalised"
ADAPTER = "adapter"


@config
class PreferenceConfig:
    """Make the preferred answer of a pair likelier than the other one; it needs data=preferences.

    Validation logs `val_preference_loss`, the margin and the share of pairs in which the preferred
    answer has the higher reward, and the log-probability of each side: both may fall while the
    margin grows.

    Args:
        loss: see `preference_losses.py`. simpo and orpo have no reference.
        beta: strength of the reference, of a nat of difference in the others.
        gamma: margin of simpo.
        odds_weight: of orpo's odds ratio beside the likelihood.
        desirable, undesirable: weights of kto's two sides.
        reference: the frozen model. `init`: what this run starts from. `adapter`: this model with
            its adapters switched off. Else the name of an input.
    """

    loss: Loss = "dpo"
    beta: float = 0.1
    gamma: float = 0.5
    odds_weight: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    reference: str = "init"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"task.beta={self.beta} must be positive")
        for name in ("gamma", "odds_weight", "desirable", "undesirable"):
            if getattr(self, name) < 0:
                raise ValueError(f"task.{name}={getattr(self, name)} must be at least 0")

    @property
    def kind(self) -> str:
        """The loss as a function of h, whether normalised by length or not."""
        return self.loss.removesuffix(_NORMALISED)

    @property
    def normalised(self) -> bool:
        """Whether h is over means of tokens."""
        return self.loss.endswith(_NORMALISED) or self.loss == "simpo"

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a frozen model."""
        return self.loss not in ("simpo", "orpo")

    def check(self, run: "RunConfig") -> None:
        """Refuse data without pairs, a z-loss, a reference that is not there, KTO on single pairs.

        Raises:
            ValueError: one of these.
        """
        if getattr(run.data, "sequences_per_sample", 1) != 2:
            raise ValueError("task=preference needs pairs of answers: add data=preferences")
        if getattr(run.model, "z_loss", 0.0):
            raise ValueError(
                f"model.z_loss={run.model.z_loss} would enlarge the logits of rejected answers, "
                "whose weights are negative; give model.z_loss=0"
            )
        if self.has_reference:
            self._check_reference(run)
        if self.loss == "kto" and run.train is not None:
            share = run.train.batch_size // run.resources.num_processes
            if share < 2:
                raise ValueError(
                    f"task.loss=kto compares prompts with the answers to others: a process needs 2 "
                    f"pairs, train.batch_size={run.train.batch_size} gives it {share}"
                )

    def _check_reference(self, run: "RunConfig") -> None:
        adapted = getattr(run.model, "adapter", None) is not None
        given = run.inputs.get(self.reference)
        if self.reference == ADAPTER:
            if not adapted:
                raise ValueError(
                    "task.reference=adapter is the model with its adapters switched off, and "
                    "model.adapter is not given; give it, or task.reference=init"
                )
            return
        if given is None and not (self.reference == "init" and run.init):
            names = ", ".join([*run.inputs, ADAPTER]) if run.inputs else "adapter"
            raise ValueError(
                f"task.reference={self.reference}: there is no such model; give init=hf:DIR or an "
                f"input of this name, or one of: {names}"
            )
        check_frozen(f"task.reference={self.reference}", self.reference, run)
        if run.train is not None and run.train.parallel == "fsdp":
            raise ValueError(
                "a reference of its own is not sharded by train.parallel=fsdp; give model.adapter "
                "and task.reference=adapter, or train.parallel=ddp"
            )

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "Preference":
        """Return the task."""
        from runner.learn.tasks.preference import Preference  # noqa: PLC0415

        return Preference(self, model, tokenizer, inputs)
