"""What data sets, sources and tokenizers of anybody's must have; what has a default here need not be there.

data       config.build(tokenizer_config, cache, hashes) -> Corpus
           optional: content_hash() -> [hash], check(tokenizer_config, seq), mask_documents, num_workers
corpus     tokenizer, samples(seq, seed), held_out(seq, batch, max_tokens)
           optional: bytes_per_counted_byte
source     of data.sources: documents() -> texts; optional: content_hash() -> hash, weight
tokenizer  config.build(documents) -> Tokenizer
           optional: planned_vocab_size(), needs_text(), content_hash() -> hash
Tokenizer  vocab_size, eos, encode(text) -> ids, decode(ids) -> text, dumps() -> JSON whose "_target_" names a
           class with loads(text) -> Tokenizer; optional: bytes_per_id(), texts()
"""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.utils.data import Dataset

    Sample = dict[str, Tensor]
else:
    Sample = dict


class Corpus(Protocol):
    """What there is to train and validate on."""

    @property
    def tokenizer(self) -> Any:
        """What its ids stand for."""

    def samples(self, seq: int, seed: int) -> "Dataset[Sample]":
        """Return the dataset whose item i is sample i of training: `tokens`, `targets` (-100: none), `documents`, `index`."""

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """Yield the batches of validation, always the same ones."""


def bytes_per_counted_byte(corpus: Any) -> float:
    """Return bytes of validation text for each byte that its tokens spell; 1 for a lossless tokenizer."""
    return float(getattr(corpus, "bytes_per_counted_byte", 1.0))


def planned_vocab_size(tokenizer: Any) -> int | None:
    """Return the vocabulary size of a tokenizer's config, None where only the text can tell."""
    known = getattr(tokenizer, "planned_vocab_size", None)
    return known() if known is not None else None


def needs_text(tokenizer: Any) -> bool:
    """Return whether a tokenizer's config is trained on the training text; no, if it does not say."""
    says = getattr(tokenizer, "needs_text", None)
    return bool(says()) if says is not None else False


def content_hash(cfg: Any) -> Any:
    """Return the hash of what a config reads, None where it reads nothing."""
    says = getattr(cfg, "content_hash", None)
    return says() if says is not None else None


def source_weight(source: Any) -> float:
    """Return a source's share of the training samples, relative to the others; 1 where it does not say."""
    return float(getattr(source, "weight", 1.0))


def source_name(source: Any) -> str:
    """Return what a person calls a source: its path, else its format or class."""
    found = getattr(source, "path", None) or getattr(source, "format", None)
    return str(found or type(source).__name__)


def bytes_per_id(tokenizer: Any) -> "np.ndarray":
    """Return the UTF-8 length of what each id stands for, [vocab_size] int32; by default by decoding it alone."""
    import numpy as np  # noqa: PLC0415

    says = getattr(tokenizer, "bytes_per_id", None)
    if says is not None:
        return np.asarray(says())
    lengths = [len(tokenizer.decode([index]).encode()) for index in range(tokenizer.vocab_size)]
    lengths[tokenizer.eos] = 0
    return np.array(lengths, dtype=np.int32)


def token_texts(tokenizer: Any) -> list[str]:
    """Return what each id stands for; `<id>` where that is nothing, or a part of a character."""
    found = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    return [t if t and "\ufffd" not in t else f"<{index}>" for index, t in enumerate(found)]


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash that differs where the tokenizer differs."""
    return hashlib.sha256(tokenizer.dumps().encode()).hexdigest()[:32]


def loads(text: str) -> Any:
    """Return the tokenizer that `dumps` wrote, ours or anybody's."""
    from models.config import target_class  # noqa: PLC0415

    data: dict[str, Any] = json.loads(text)
    if "_target_" in data:
        return target_class(data["_target_"]).loads(text)
    from runner.data import tokenizers  # noqa: PLC0415

    return tokenizers.loads(data)
