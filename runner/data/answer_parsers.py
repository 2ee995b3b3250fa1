"""The answer that a text gives, in a form in which equal answers are equal strings."""

import re
from typing import Protocol

from models.config import config
from runner.data.arithmetic import number

_NUMBER = r"\s*\$?\s*(-?\s*\$?\s*[0-9.,]*[0-9])"
# Not the beginning of something else: 3/4, 10:30, 1e3.
_NO_MORE = r"(?![.,]?[0-9]|\s*[/:^]\s*[0-9]|[eE][+-]?[0-9])"
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")


class AnswerParser(Protocol):
    """Finds the answer of a text; a config class of a node with `_target_`."""

    def parse(self, text: str) -> str | None:
        """Return the answer in canonical form, None if the text gives none."""


@config
class MarkedNumber:
    """The number after the first `mark`, as in GSM8K's "#### 18".

    "1,000", "$1000" and "1000.0" are one answer; "3/4", "10:30", "1e3" and "1,5" are none.

    Args:
        mark: what precedes the answer.
    """

    mark: str = "####"

    def __post_init__(self) -> None:
        if not self.mark:
            raise ValueError("mark='' is empty; give what stands before an answer, as in '####'")

    def parse(self, text: str) -> str | None:
        """See `AnswerParser`."""
        _, _, after = text.partition(self.mark)
        found = re.match(_NUMBER + _NO_MORE, after)
        plain = re.sub(r"[\s$]", "", found[1]) if found else ""
        if not plain or ("," in plain and not _THOUSANDS.fullmatch(plain)):
            return None
        try:
            return str(number(plain))
        except ValueError:  # 1.2.3
            return None
