"""A calculator for inline calls: sums, and how often letters stand in a word; nothing is run."""

import re

from models.config import config
from runner.data.arithmetic import value_of, written

_COUNT = re.compile(r"""\s*(['"])([^'"]{0,200})\1\.count\((['"])([^'"]{0,200})\3\)\s*""")


@config
class CalculatorConfig:
    """Answers `<<48/2=` with `24>>`, the form of GSM8K, or as its marks say.

    Args:
        opens, closes: what a call stands between.
        before, after: what stands before and after the answer.
        timeout_s: seconds to wait for an answer.
    """

    opens: str = "<<"
    closes: str = "="
    before: str = ""
    after: str = ">>"
    timeout_s: float = 3.0

    def __call__(self, text: str) -> str:
        """Return the value of a sum, or of 'word'.count('w'), as it is written.

        Raises:
            ValueError: it is neither, is too long, or divides by zero.
        """
        counted = _COUNT.fullmatch(text)
        if counted is not None:
            return str(counted[2].count(counted[4]))
        return written(value_of(text))
