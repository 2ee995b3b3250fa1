"""A source format: documents that are computed."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SquaresConfig:
    """So many sentences about squares."""

    count: int = 100

    def documents(self) -> Iterator[str]:
        """Yield the documents."""
        words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        for i in range(self.count):
            said = " ".join(words[int(digit)] for digit in str(i * i))
            yield f"the square of number {i} is {said}"

    def content_hash(self) -> str:
        """Return what stands for the documents in a fingerprint."""
        return f"squares {self.count}"
