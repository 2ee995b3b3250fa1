"""The answer that a text gives, in a form in which equal answers are equal strings."""

import re
from typing import Protocol

from models.config import config
from runner.data.arithmetic import number

_NUMBER = r"\s*\$?\s*(-?\s*\$?\s*[0-9.,]*[0-9])"


class AnswerParser(Protocol):
    """Finds the answer of a text; a config class of a node with `_target_`."""

    def parse(self, text: str) -> str | None:
        """Return the answer in canonical form, None if the text gives none."""


@config
class MarkedNumber:
    """The number after the first `mark`, as in GSM8K's "#### 18".

    "1,000", "$1000" and "1000.0" are one answer.

    Args:
        mark: what precedes the answer.
    """

    mark: str = "####"

    def __post_init__(self) -> None:
        if not self.mark:
            raise ValueError("mark='' is empty; give what stands before an answer, as in '####'")

    def parse(self, text: str) -> str | None:
        """See `AnswerParser`."""
        found = re.search(re.escape(self.mark) + _NUMBER, text)
        if found is None:
            return None
        try:
            return str(number(re.sub(r"[\s$]", "", found[1])))
        except ValueError:  # 1.2.3
            return None
