"""A source of text: numbers in words that count up."""

from collections.abc import Iterator

from models.config import config

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@config
class CountingConfig:
    """Texts that count up from each digit.

    Args:
        texts: number of documents.
        weight: of the source in a mixture.
    """

    texts: int = 400
    weight: float = 1.0

    def content_hash(self) -> str:
        """Return what identifies the texts: it is part of a run's fingerprint."""
        return f"counting-{self.texts}"

    def documents(self) -> Iterator[str]:
        """Yield the texts."""
        for start in range(self.texts):
            yield " ".join(_WORDS[(start + k) % 10] for k in range(30 + start % 7))
