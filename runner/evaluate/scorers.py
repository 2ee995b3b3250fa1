"""Scorers of answers: a verifier, or the likelihood under a model."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runner.data.corpus import encode_pieces
from runner.evaluate.answer_scorer import AnswerScorer
from runner.evaluate.likelihoods import log_probabilities
from runner.machine.errors import ConfigError


@dataclass(frozen=True)
class LikelihoodScorer:
    """See `Likelihood`.

    Args:
        context: the most tokens that are read.
    """

    model: Any
    tokenizer: Any
    context: int

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """See `Scorer`."""
        texts = []
        for prompt, answer in zip(prompts, answers, strict=True):
            parts = [part.tolist() for part in encode_pieces(self.tokenizer, [prompt, answer])]
            ids = [*parts[0], *parts[1], self.tokenizer.eos][: self.context]
            texts.append((ids, min(len(parts[0]), len(ids) - 1)))
        found = log_probabilities(
            self.model, self.tokenizer, texts, context=self.context, shares_prefixes=False
        )
        return [sum(logprobs) / len(logprobs) for logprobs in found]


@dataclass(frozen=True)
class VerifierScorer:
    """See `VerifierScore`."""

    verifier: AnswerScorer
    of: str

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """See `Scorer`."""
        scores, readable = [0.0] * len(answers), {}
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            with suppress(ConfigError):
                readable[number] = self.verifier.render(prompt, answer, "the answer")
        found = self.verifier.score_rendered(list(readable.values()))
        for number, score in zip(readable, found, strict=True):
            scores[number] = getattr(score, self.of)
        return scores
