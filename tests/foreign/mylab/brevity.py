"""A reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Brevity:
    """The fewer characters, the more."""

    weight: float = 1.0

    def score(self, answers: Sequence[Any]) -> list[float]:
        """Return minus the number of characters of each answer."""
        return [-float(len(answer.text)) for answer in answers]
