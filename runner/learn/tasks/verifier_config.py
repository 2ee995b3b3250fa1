"""The config of a verifier."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.config import config
from runner.records.contracts import Inputs

if TYPE_CHECKING:
    from runner.learn.tasks.verifier import Scorer, Verifier
    from runner.records.config import RunConfig

SCORE = "<score>"


@config
class VerifierConfig:
    """Say of an answer how likely it is right; it needs data=solutions.

    The score is the logit of a token of its own, `<score>` (Cobbe et al., arXiv 2110.14168), that
    is added to the vocabulary and is no part of any text. The loss of an answer is the mean binary
    cross-entropy of its scores, and `lm_weight` times the mean negative log-likelihood of its
    tokens.

    Args:
        score: what is judged. end: the answer, after the token that ends it. token: the answer, at
            each of its tokens. step: each step, at its end, by the label of its own.
        lm_weight: of next-token prediction of the answers beside it.
    """

    tokens: ClassVar[tuple[str, ...]] = (SCORE,)

    score: Literal["end", "token", "step"] = "token"
    lm_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.lm_weight < 0:
            raise ValueError(f"task.lm_weight={self.lm_weight} must be at least 0")

    def check(self, run: "RunConfig") -> None:
        """Refuse data without labels, and a model that sees the end of an answer at its beginning.

        Raises:
            ValueError: one of the two.
        """
        if not getattr(run.data, "labelled", False):
            raise ValueError("task=verifier needs answers with labels: add data=solutions")
        if not getattr(run.model, "causal", True):
            raise ValueError(
                "task=verifier reads an answer from left to right, model.causal=false sees its end "
                "before; leave model.causal=false out"
            )

    def build(self, model: Any, tokenizer: Any, inputs: Inputs) -> "Verifier":
        """Return the task."""
        from runner.learn.tasks.verifier import Verifier  # noqa: PLC0415

        return Verifier(self, tokenizer)

    def scorer(self, model: Any, tokenizer: Any) -> "Scorer":
        """Return how a trained model judges answers."""
        from runner.learn.tasks.verifier import Scorer  # noqa: PLC0415

        return Scorer(model, tokenizer, by_step=self.score == "step")
