"""The tokens of a model one by one: their text and bytes, and grammars over them.

llguidance masks what may come next; no grammar of ours. It bounds the work of a grammar itself,
so that one that is too large is refused.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

_BROKEN = "\ufffd"


class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        ends: the ids that end a text.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        self.tokenizer, self.ends = tokenizer, tuple(ends)
        self.size = int(tokenizer.vocab_size)
        self.text = lru_cache(maxsize=1 << 16)(self._text)
        self._inner = _grammar_tokenizer(tokenizer, self.ends)

    def _text(self, id: int) -> str:
        """Return the text of a token by itself; no two ids that a list may hold have one text.

        A token without text, or with a part of a character only, is `token_id:N`.
        """
        text: str = self.tokenizer.decode([id])
        return text if text and _BROKEN not in text else f"token_id:{id}"

    def bytes(self, id: int) -> list[int]:
        """Return the bytes of a token; a special one has none."""
        inner = self._inner
        return [] if inner.is_special_token(id) else list(inner.decode_bytes([id]))

    def grammar(self, source: str) -> "Grammar":
        """Return what lets a text obey a grammar of llguidance.

        Raises:
            ValueError: it is no grammar, or too large.
        """
        matcher = llguidance.LLMatcher(self._inner, source, log_level=0)
        if matcher.is_error():
            raise ValueError(_first_line(matcher))
        return Grammar(matcher, self.ends, self.size)


def _grammar_tokenizer(tokenizer: Any, ends: Sequence[int]) -> llguidance.LLTokenizer:
    own = tokenizer
    while hasattr(own, "inner"):  # special tokens behind those of a text
        own = own.inner
    given: Any = getattr(own, "serialised", None)
    if given is None:
        given = llguidance.TokenizerWrapper(_Bytes(tokenizer))
    return llguidance.LLTokenizer(given, n_vocab=int(tokenizer.vocab_size), eos_token=list(ends))


class _Bytes:
    """What llguidance asks of a tokenizer that is none of Hugging Face's."""

    bos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        texts = [tokenizer.decode([i]) for i in range(int(tokenizer.vocab_size))]
        self.eos_token_id = int(tokenizer.eos)
        self.special_token_ids = [i for i, text in enumerate(texts) if not text]
        # An id whose text is broken is a byte: the tokenizer of bytes is the only one that has any.
        self.tokens = [
            bytes([i % 256]) if _BROKEN in text else text.encode() or f"<{i}>".encode()
            for i, text in enumerate(texts)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        given = text.decode(errors="replace") if isinstance(text, bytes) else text
        return [int(i) for i in self._tokenizer.encode(given)]


class Grammar:
    """A constraint of a request, see `runner.generate.request.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: Sequence[int], size: int) -> None:
        self._matcher, self._ends, self._size, self._seen = matcher, list(ends), size, 0

    def copy(self) -> "Grammar":
        """Return the same at its beginning, for another text."""
        return Grammar(self._matcher.deep_copy(), self._ends, self._size)

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Return which ids may follow, [vocab]; the ends where the grammar is satisfied."""
        new, self._seen = list(ids[self._seen :]), len(ids)
        if new and not self._matcher.consume_tokens(new):
            raise ValueError(f"the grammar ends here: {_first_line(self._matcher)}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(
                f"the grammar allows nothing more ({_first_line(self._matcher)}); make it simpler, "
                "or one that a text can satisfy"
            )
        mask = np.zeros(self._size, dtype=bool)
        allowed = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        mask[: len(allowed)] = allowed
        mask[self._ends] = self._matcher.is_accepting() or mask[self._ends].any()
        return torch.from_numpy(mask)


def _first_line(matcher: llguidance.LLMatcher) -> str:
    """Return what is wrong; the state of the parser, which follows, helps nobody."""
    return str(matcher.get_error()).partition("\n")[0][:300]


def json_grammar(schema: dict[str, Any] | bool) -> str:
    """Return the grammar of JSON that obeys a schema (True: any), without needless spaces.

    White space between the parts is of no fixed length: a model that likes it would never end.
    """
    given = schema if isinstance(schema, dict) else {}
    compact: Any = {"whitespace_flexible": False}
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(given), overrides=compact)


def regex_grammar(pattern: str) -> str:
    """Return the grammar of a regular expression."""
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """Return the grammar of one of several texts."""
    return llguidance.LLMatcher.grammar_from_lark(
        "start: " + " | ".join(json.dumps(choice) for choice in choices)
    )
