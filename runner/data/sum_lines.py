"""Lines of sums as text, made from a seed: a task whose answers are known and of one length."""

import random
from collections.abc import Iterator

from models.config import config


@config
class SumLinesConfig:
    """Lines such as `17+25=0042`, in one document; a source of `data.sources`.

    Args:
        lines: the number of lines.
        digits: of each number; the result has twice as many, filled up with zeros.
        data_seed: draws the numbers.
        weight: share of the training samples, relative to the other sources.
    """

    lines: int = 20000
    digits: int = 2
    data_seed: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lines", "digits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def documents(self) -> Iterator[str]:
        """Yield the document."""
        yield "".join(f"{asked}{answer}\n" for asked, answer in self.sums())

    def sums(self) -> Iterator[tuple[str, str]]:
        """Yield (`17+25=`, `0042`) of each line."""
        rng = random.Random(self.data_seed)
        for _ in range(self.lines):
            a, b = (rng.randrange(10**self.digits) for _ in range(2))
            asked = f"{a:0{self.digits}d}+{b:0{self.digits}d}="
            yield asked, f"{a + b:0{2 * self.digits}d}"


def is_right(line: str) -> bool:
    """Return whether a line is a sum, and right."""
    asked, equals, answer = line.partition("=")
    numbers = asked.split("+")
    if not equals or len(numbers) != 2 or not all(n.isdecimal() for n in (*numbers, answer)):
        return False
    return sum(map(int, numbers)) == int(answer)
