"""The config of masked diffusion that fills in middles of any length."""

from typing import TYPE_CHECKING, Any, Literal

from models.config import config
from runner.data.corpus import end_ids, refuse_several_sequences, token_id
from runner.data.tokenizer_folder import DELETE, EXPAND, MASK
from runner.learn.tasks.diffusion_config import refuse_causal
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.generate.denoise import Denoise
    from runner.learn.tasks.diffusion_infill import DiffusionInfill
    from runner.records.config import RunConfig


@config
class DiffusionInfillConfig:
    """Masked diffusion of a middle whose length is not known (DreamOn, arXiv 2602.01326).

    Of each sample a middle is chosen; what stands around it is given. Its tokens are hidden with a
    probability t, uniform in (0, 1), and weigh 1 - t. Behind it stand up to `max_deletes` masks
    whose answer is `<delete>`, which together weigh as one token. A mask takes in the one after it
    with a probability: its answer is then `<expand>`. Validation logs `val_infill_loss`, no bound
    on a likelihood, in nats per token so counted.

    Args:
        middle: a line of the text, its end included (`line`; a span where there is none), or a
            span anywhere (`span`).
        max_middle: the longest span.
        max_deletes: 0: the model takes no mask away.
        merge: the probability of taking in the next mask in half of the samples; in the others it
            falls with the part of the middle that is hidden. 0: a mask never becomes two.
        shift: the output at a token predicts the next one, as in a model that was pre-trained on
            next tokens.
    """

    middle: Literal["line", "span"] = "line"
    max_middle: int = 32
    max_deletes: int = 63
    merge: float = 0.5
    shift: bool = False

    def __post_init__(self) -> None:
        checks = {
            "max_middle": (self.max_middle >= 1, "at least 1"),
            "max_deletes": (self.max_deletes >= 0, "at least 0"),
            "merge": (0 <= self.merge <= 1, "in [0, 1]"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"task.{name}={getattr(self, name)} must be {wanted}")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The special tokens that the task adds."""
        return (MASK, EXPAND, DELETE)

    def check(self, run: "RunConfig") -> None:
        """Refuse a causal model.

        Raises:
            ValueError: it is one.
        """
        refuse_causal(run, "diffusion_infill")
        refuse_several_sequences(run.data, "diffusion_infill")

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "DiffusionInfill":
        """Return the task."""
        from runner.learn.tasks.diffusion_infill import DiffusionInfill  # noqa: PLC0415

        return DiffusionInfill(self, tokenizer)

    def strategy(self, model: Any, tokenizer: Any, context: int) -> "Denoise":
        """Return how the model generates: by filling in a canvas, whose length it changes."""
        from runner.generate.denoise import Denoise  # noqa: PLC0415

        mask = token_id(tokenizer, MASK)
        assert mask is not None
        return Denoise(
            model,
            context=context,
            decode=tokenizer.decode,
            mask=mask,
            ends=end_ids(tokenizer),
            shift=self.shift,
            expand=token_id(tokenizer, EXPAND) if self.merge else None,
            delete=token_id(tokenizer, DELETE) if self.max_deletes else None,
        )
