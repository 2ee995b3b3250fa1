"""Scorers of answers: a verifier, or the likelihood under a model, named in YAML by `_target_`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from models.config import config
from runner.data.corpus import encode_pieces
from runner.generate.generate import make_engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.machine.errors import ConfigError
from runner.records.contracts import Trained


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
        context = trained.cfg.train.sequence_length + 1
        return LikelihoodScorer(trained.model, trained.corpus.tokenizer, context)


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


@config
class VerifierScore:
    """How likely an answer is right by the verifier (task=verifier) that is an input of the run.

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

        cfg = trained.cfg
        if self.input not in cfg.inputs:
            raise ConfigError(
                f"the scorer is the input {self.input!r}, and the run has: "
                f"{', '.join(cfg.inputs) or 'none'}; set inputs.{self.input}.runs=[FINGERPRINT]"
            )
        given = cfg.inputs[self.input]
        folder = Path(cfg.root) / "runs" / given.run
        return VerifierScorer(AnswerScorer(folder, average=given.take == "average"), self.of)


@dataclass(frozen=True)
class VerifierScorer:
    """See `VerifierScore`."""

    verifier: Any
    of: str

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """See `Scorer`; an empty answer has the score 0."""
        scores = [0.0] * len(answers)
        of_prompt: dict[str, list[int]] = {}
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if answer.strip():
                of_prompt.setdefault(prompt, []).append(index)
        for prompt, own in of_prompt.items():
            found = self.verifier.score(prompt, [answers[i] for i in own])
            for index, score in zip(own, found, strict=True):
                scores[index] = float(getattr(score, self.of))
        return scores
