"""Scorers of answers: a verifier, or the likelihood under a model."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from runner.data.corpus import encode_pieces
from runner.evaluate.answer_scorer import AnswerScorer
from runner.generate.generate import make_engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling
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

    @torch.no_grad()
    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """See `Scorer`."""
        engine = make_engine(
            self.model, context=self.context, decode=self.tokenizer.decode, ends=(), rows=256
        )
        requests = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            parts = [part.tolist() for part in encode_pieces(self.tokenizer, [prompt, answer])]
            ids = [*parts[0], *parts[1], self.tokenizer.eos][: self.context]
            how = Sampling(max_new_tokens=0)
            first = min(len(parts[0]), len(ids) - 1)
            requests.append(Request(id=str(number), prompt=ids, how=how, score_from=first))
        scores = [0.0] * len(requests)
        for event in engine.run(requests):
            if event.error is not None:
                raise event.error
            if event.prompt_scores is not None:
                logprobs = event.prompt_scores.logprobs
                scores[int(event.id)] = sum(logprobs) / len(logprobs)
        return scores


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
