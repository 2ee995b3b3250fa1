"""Configs of scorers of answers: a verifier, or the likelihood under a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from models.config import config
from runner.records.contracts import Trained
from runner.records.inputs import named_input

if TYPE_CHECKING:
    from runner.evaluate.scorers import LikelihoodScorer, VerifierScorer


class Scorer(Protocol):
    """Judges answers; what `build` of its config returns."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """Return the score of each answer to its prompt, the higher the better."""


class ScorerConfig(Protocol):
    """The config of a scorer."""

    def build(self, trained: Trained) -> Scorer:
        """Return the scorer of answers by the model `trained`; all ranks call it."""


@config
class Likelihood:
    """The mean log-probability of an answer's tokens under the model that wrote it, nats."""

    def build(self, trained: Trained) -> "LikelihoodScorer":
        """See `ScorerConfig`."""
        from runner.evaluate.scorers import LikelihoodScorer  # noqa: PLC0415

        context = trained.cfg.train.sequence_length + 1
        return LikelihoodScorer(trained.model, trained.corpus.tokenizer, context)


@config
class VerifierScore:
    """How likely an answer is right by the verifier (task=verifier) that is an input of the run.

    An answer that the verifier cannot read, empty or longer than its context, has 0.

    Args:
        input: the name of the input.
        of: end: after the last token. least, product: of the scores of all lines, the steps.
    """

    input: str = "verifier"
    of: Literal["end", "least", "product"] = "end"

    def build(self, trained: Trained) -> "VerifierScorer":
        """See `ScorerConfig`.

        Raises:
            ConfigError: the run has no such input, or it is no verifier.
        """
        from runner.evaluate.answer_scorer import AnswerScorer  # noqa: PLC0415
        from runner.evaluate.scorers import VerifierScorer  # noqa: PLC0415

        cfg = trained.cfg
        given = named_input(cfg.inputs, self.input, "the scorer")
        folder = Path(cfg.root) / "runs" / given.run
        return VerifierScorer(AnswerScorer(folder, average=given.take == "average"), self.of)
