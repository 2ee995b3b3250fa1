"""A tokenizer: the 26 letters, one id for all else, one that ends a document."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LettersConfig:
    """Nothing is trained: `lower` folds capitals."""

    lower: bool = True

    def build(self, documents: Iterable[str]) -> "Letters":
        """Return the tokenizer."""
        return Letters(self.lower)

    def planned_vocab_size(self) -> int:
        """Return what the plan goes by."""
        return 28


class Letters:
    """Ids 0-25 are letters, 26 is any other character."""

    vocab_size, eos = 28, 27

    def __init__(self, lower: bool) -> None:
        self.lower = lower

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text."""
        text = text.lower() if self.lower else text
        return np.array([ord(c) - 97 if "a" <= c <= "z" else 26 for c in text], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        return "".join("abcdefghijklmnopqrstuvwxyz "[i] for i in ids if i != self.eos)

    def dumps(self) -> str:
        """Return what `loads` reads."""
        return json.dumps({"_target_": "mylab.letters.Letters", "lower": self.lower})

    @classmethod
    def loads(cls, text: str) -> "Letters":
        """Return the tokenizer that `dumps` wrote."""
        return cls(json.loads(text)["lower"])
