"""Scores of answers by a verifier that a run has trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from runner.data.judged_answer_rows import Answer
from runner.data.judged_answers import AnswerRenderer, RenderedAnswer
from runner.machine.errors import ConfigError
from runner.records.cells import load_cell
from runner.records.contracts import scorer
from runner.records.trained_model import load_model


@dataclass(frozen=True)
class Score:
    """What a verifier says of an answer, probabilities of being right.

    Args:
        end: after the last token.
        steps: after each line.
    """

    end: float
    steps: tuple[float, ...]

    @property
    def least(self) -> float:
        """That of the worst step."""
        return min(self.steps)

    @property
    def product(self) -> float:
        """That of all steps, were they independent."""
        return prod(self.steps)


class AnswerScorer:
    """The verifier of a run folder.

    Args:
        batch_size: answers of a forward pass.

    Attributes:
        by_step: whether it judges steps, not the answer so far.

    Raises:
        ConfigError: the run has no verifier.
        CheckpointError: it has no checkpoint yet.
    """

    def __init__(self, folder: Path, *, average: bool = False, batch_size: int = 16) -> None:
        cfg = load_cell(folder).config
        model, tokenizer, self.context = load_model(folder, average=average)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.scorer: Any = scorer(cfg.task, model.to(self.device).eval(), tokenizer)
        if self.scorer is None:
            raise ConfigError(
                f"{folder} has no verifier, its task is {type(cfg.task).__name__}; give a run of "
                "task=verifier"
            )
        self.by_step = bool(self.scorer.by_step)
        self.renderer, self.batch_size = AnswerRenderer(tokenizer, cfg.data.form), batch_size

    def score(self, problem: str, answers: Sequence[str]) -> list[Score]:
        """Return the scores of answers to a problem; an answer's lines are its steps.

        Raises:
            ConfigError: an answer is empty or does not fit into the context.
        """
        texts = enumerate(answers, start=1)
        return self.score_rendered(
            [self.render(problem, text, f"answer {number}") for number, text in texts]
        )

    def render(self, problem: str, answer: str, name: str) -> RenderedAnswer:
        """Return an answer and its problem in ids.

        Args:
            name: of the answer, for messages.

        Raises:
            ConfigError: it is empty or does not fit into the context.
        """
        if not answer.strip():
            raise ConfigError(f"{name} is empty: there is nothing to score")
        prompt = ({"role": "user", "content": problem},)
        rendered = self.renderer.render(Answer(name, prompt, _steps(answer)))
        if len(rendered.ids) > self.context:
            raise ConfigError(
                f"{name} and its problem are {len(rendered.ids)} tokens, the verifier reads "
                f"{self.context}; shorten them"
            )
        return rendered

    def score_rendered(self, rendered: Sequence[RenderedAnswer]) -> list[Score]:
        """Return the scores of answers of `render`."""
        result = []
        for start in range(0, len(rendered), self.batch_size):
            part = rendered[start : start + self.batch_size]
            ids = [torch.from_numpy(one.ids.astype("int64")) for one in part]
            scores = self.scorer.scores(pad_sequence(ids, batch_first=True).to(self.device)).cpu()
            for row, one in zip(scores, part, strict=True):
                steps = [float(row[at]) for at in one.step_ends.nonzero()[0]]
                result.append(Score(end=steps[-1], steps=tuple(steps)))
        return result


def _steps(text: str) -> tuple[str, ...]:
    """Return the lines of a text, blank ones as a part of the next, or of the last."""
    steps, blank = [], ""
    for line in text.split("\n"):
        if line.strip():
            steps.append(blank + line)
            blank = ""
        else:
            blank += f"{line}\n"
    if blank:
        steps[-1] += f"\n{blank[:-1]}"
    return tuple(steps)
