"""Special tokens that a task adds to a tokenizer: `<mask>`, `<expand>`."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.data.corpus import (
    Sample,
    Samples,
    bytes_per_counted_byte,
    bytes_per_id,
    control_texts,
    encode_literally,
    encode_pieces,
    encode_with_special,
    end_ids,
    loads,
    statistics,
    token_id,
)
from runner.data.tokenizers import Tokenizer


class WithTokens(Tokenizer):
    """A tokenizer with special tokens after its own ids; no text encodes to one.

    Args:
        inner: the tokenizer of the text.
        names: of the special tokens, in the order of their ids.
    """

    def __init__(self, inner: Any, names: Sequence[str]) -> None:
        self.inner, self.names = inner, tuple(names)
        self.eos, self.bos, self.ends = inner.eos, getattr(inner, "bos", None), end_ids(inner)
        self.token_ids = {name: inner.vocab_size + place for place, name in enumerate(names)}
        self.num_added = len(self.names)
        self.vocab_size = inner.vocab_size + self.num_added
        self.beside, self.eos_token = (
            getattr(inner, "beside", None),
            getattr(inner, "eos_token", ""),
        )

    def encode(self, text: str) -> np.ndarray:
        ids: np.ndarray = self.inner.encode(text)
        return ids

    def encode_with_special(self, text: str) -> np.ndarray:
        """See `corpus.encode_with_special`."""
        return encode_with_special(self.inner, text)

    def control_texts(self) -> list[str]:
        """See `corpus.control_texts`."""
        return control_texts(self.inner)

    def encode_literally(self, text: str) -> np.ndarray:
        """See `corpus.encode_literally`."""
        return encode_literally(self.inner, text)

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """See `corpus.encode_pieces`."""
        return encode_pieces(self.inner, pieces)

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self.inner.decode([index for index in ids if index < self.inner.vocab_size])
        return text

    def bytes_per_id(self) -> np.ndarray:
        return np.append(bytes_per_id(self.inner), np.zeros(len(self.names), dtype=np.int32))

    def dumps(self) -> str:
        target = "runner.data.special_tokens.WithTokens"
        return json.dumps({"_target_": target, "names": self.names, "inner": self.inner.dumps()})

    @classmethod
    def loads(cls, text: str) -> "WithTokens":
        """Return the tokenizer whose `dumps` returned `text`."""
        data = json.loads(text)
        return cls(loads(data["inner"]), data["names"])


@dataclass(frozen=True)
class CorpusWithTokens:
    """A corpus under a tokenizer that has more special tokens than the one that made its ids."""

    corpus: Any
    tokenizer: WithTokens

    @property
    def bytes_per_counted_byte(self) -> float:
        return bytes_per_counted_byte(self.corpus)

    def samples(self, seq: int, seed: int) -> Samples:
        """See `Corpus`."""
        samples: Samples = self.corpus.samples(seq, seed)
        return samples

    def statistics(self, seq: int) -> dict[str, float]:
        """See `corpus.statistics`."""
        return statistics(self.corpus, seq)

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`."""
        return iter(self.corpus.held_out(seq, batch, max_tokens))


def with_tokens(corpus: Any, names: Sequence[str]) -> Any:
    """Return the corpus under a tokenizer that has the special tokens `names` too."""
    missing = [name for name in names if token_id(corpus.tokenizer, name) is None]
    if not missing:
        return corpus
    return CorpusWithTokens(corpus, WithTokens(corpus.tokenizer, missing))
