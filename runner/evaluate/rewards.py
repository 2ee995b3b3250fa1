"""Rewards of generated answers: each a config class with `score`, named in YAML by `_target_`."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from models.config import any_config, config, execution
from runner.data.answer_parsers import MarkedNumber
from runner.evaluate.sandbox import Limits, choose_wall, run
from runner.machine.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """What a model has written for a prompt.

    Args:
        prompt, text: the texts.
        reference: the solution of the problem; for a program its tests.
        num_tokens: of `text`, its end included.
        cut: whether it was cut off at the most tokens.
    """

    prompt: str
    text: str
    reference: str
    num_tokens: int
    cut: bool


class Reward(Protocol):
    """Scores answers.

    Optional:
        weight: what the score is multiplied with in the sum of all rewards (default: 1).
    """

    def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        """Return the score of each answer, a finite number."""


def weight(reward: Any) -> float:
    """Return the weight of a reward."""
    return float(getattr(reward, "weight", 1.0))


def checked_scores(whose: str, given: Iterable[Any], count: int) -> list[float]:
    """Return the scores of `count` answers as numbers.

    Args:
        whose: what gave them, for messages.

    Raises:
        ConfigError: they are not as many, or one is no finite number.
    """
    scores = list(given)
    if len(scores) != count:
        raise ConfigError(
            f"{whose} gave {len(scores)} scores for {count} answers; it must give one for each"
        )
    for number, score in enumerate(scores):
        try:
            scores[number] = float(score)
        except (TypeError, ValueError):
            scores[number] = math.nan
        if not math.isfinite(scores[number]):
            raise ConfigError(
                f"{whose} gave {score!r} as the score of answer {number}; scores are compared and "
                "added: give a finite number"
            )
    return scores


def is_right(answer: Answer, parser: Any) -> bool:
    """Return whether the parsed answer is that of the reference."""
    found = parser.parse(answer.text)
    return found is not None and found == parser.parse(answer.reference)


@config
class RightAnswer:
    """1 where the answer parsed from the text is that of the reference, else 0.

    Args:
        parser: finds the answer in both, see `runner.data.answer_parsers` (None: the number after
            "####").
        weight: in the sum of all rewards.
    """

    parser: Any = any_config()
    weight: float = 1.0

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """See `Reward`.

        Raises:
            ValueError: a reference has no answer: nothing could ever be right.
        """
        parser = self.parser or MarkedNumber()
        for answer in answers:
            if parser.parse(answer.reference) is None:
                raise ValueError(
                    f"the reference {answer.reference[:80]!r} of the prompt "
                    f"{answer.prompt[-80:]!r} has no answer that {parser} finds; set the parser "
                    "of the reward to the form of the data"
                )
        return [float(is_right(answer, parser)) for answer in answers]


@config
class Format:
    """1 where a regular expression matches the whole text, else 0.

    Args:
        pattern: of Python; "." matches line breaks too.
        weight: in the sum of all rewards.
    """

    pattern: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(
                f"pattern={self.pattern!r} is no regular expression ({error}); mend it"
            ) from None

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """See `Reward`."""
        form = re.compile(self.pattern, re.DOTALL)
        return [float(form.fullmatch(answer.text) is not None) for answer in answers]


@config
class Overlong:
    """0 up to `most` - `margin` tokens, -1 at `most` and above, linear between (DAPO).

    Source: Yu et al., arXiv 2503.14476, equation 13.

    Args:
        most, margin: tokens.
        weight: in the sum of all rewards.
    """

    most: int
    margin: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.margin <= self.most:
            raise ValueError(f"margin={self.margin} must be in 1 to most={self.most}")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """See `Reward`."""
        free = self.most - self.margin
        over = [(answer.num_tokens - free) / self.margin for answer in answers]
        return [-min(1.0, max(0.0, share)) for share in over]


@config
class PassesTests:
    """1 where the text is a Python program that passes the tests of the reference, else 0.

    Programs run in a sandbox: see `runner.evaluate.sandbox`.

    Args:
        from_prompt: the program begins with the prompt (a function's head).
        seconds: of wall time for each program.
        allow_unsafe_code: run programs even where no sandbox works.
        weight: in the sum of all rewards.
    """

    from_prompt: bool = False
    seconds: float = 10.0
    allow_unsafe_code: bool = execution(False)
    weight: float = 1.0

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """See `Reward`.

        Raises:
            ConfigError: no sandbox works here, and `allow_unsafe_code` is False.
        """
        wall, limits = choose_wall(self.allow_unsafe_code), Limits(wall_s=self.seconds)
        scores = []
        for answer in answers:
            program = (answer.prompt if self.from_prompt else "") + answer.text
            program = f"{program}\n{answer.reference}"
            scores.append(float(run(program, wall=wall, limits=limits).passed))
        return scores
