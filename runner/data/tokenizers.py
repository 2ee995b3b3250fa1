"""Tokenizers: bytes, characters, symbols, trained subwords, Hugging Face tokenizer folders.

Each has an end-of-document id, `eos`, and the number of bytes of text for each id, so that losses
can be given in bits per byte. Some put special tokens of their own around a text.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from runner.data.tokenizer_folder import GENERATION, MASK, FolderFiles, resizing_ids
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import DataError

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer(ABC):
    """Base class. Ids are in [0, vocab_size); `eos` ends a document and counts 0 bytes of text.

    What may be said besides, and what holds where it is not, `runner/data/corpus.py` lists.
    """

    vocab_size: int
    eos: int

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, without special tokens around it."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without special ids; invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def bytes_per_id(self) -> np.ndarray:
        """Return the UTF-8 length of the text of each id, [vocab_size] int32; 0 for special ids.

        Where a tokenizer normalises text or drops white space, the sum over a text's ids is less
        than the text's length.
        """

    @abstractmethod
    def dumps(self) -> str:
        """Return the tokenizer as JSON, from which `loads` restores it."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0-255 and eos = 256."""

    vocab_size, eos = 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def bytes_per_id(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int32)

    def dumps(self) -> str:
        return json.dumps({"kind": "bytes"})


class CharTokenizer(Tokenizer):
    """The characters of the training text, sorted, and eos last."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size, self.eos = len(characters) + 1, len(characters)
        self._id = {c: i for i, c in enumerate(characters)}

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array([self._id[c] for c in text], dtype=np.int32)
        except KeyError as error:
            raise DataError(
                f"character {error.args[0]!r} is not among the {len(self.characters)} of the "
                "training text; use tokenizer=bytes"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids if i != self.eos)

    def bytes_per_id(self) -> np.ndarray:
        return np.array([len(c.encode("utf-8")) for c in self.characters] + [0], dtype=np.int32)

    def dumps(self) -> str:
        return json.dumps({"kind": "char", "characters": self.characters}, ensure_ascii=False)


class SymbolTokenizer(Tokenizer):
    """Ids written as numbers, `7 12 7`, for synthetic data; the last id is eos."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos = vocab_size, vocab_size - 1

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = np.array([int(word) for word in text.split()], dtype=np.int64)
        except ValueError:
            raise DataError(
                f"{text[:40]!r} is not a row of numbers, which tokenizer.kind=symbols reads"
            ) from None
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise DataError(
                f"{text[:40]!r} has a number outside 0..{self.vocab_size - 1}; "
                "raise tokenizer.vocab_size"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f" {index}" for index in ids if index != self.eos)

    def bytes_per_id(self) -> np.ndarray:
        lengths = np.array([len(f" {index}") for index in range(self.vocab_size)], dtype=np.int32)
        lengths[self.eos] = 0
        return lengths

    def dumps(self) -> str:
        return json.dumps({"kind": "symbols", "vocab_size": self.vocab_size})


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` package, trained here or loaded from a Hugging Face folder.

    Args:
        serialised: its tokenizer.json.
        eos_token: the token that ends a document.
        padded: the vocabulary size of its model, which may have more rows than there are ids.
        beside: what the further files of its folder say.

    Attributes:
        bos: the id that stands before an empty text, None if `eos` does.
        ends: the ids that end a generated text.
        token_ids: ids of `<mask>`, `<expand>` and `<delete>`, as far as the folder names them.
    """

    def __init__(
        self,
        serialised: str,
        eos_token: str,
        padded: int | None = None,
        beside: FolderFiles | None = None,
    ) -> None:
        import tokenizers  # noqa: PLC0415

        self.serialised, self.eos_token, self._padded = serialised, eos_token, padded
        self.beside = beside or FolderFiles()
        self._inner = tokenizers.Tokenizer.from_str(serialised)
        eos = self._inner.token_to_id(eos_token)
        if eos is None:
            raise DataError(f"the tokenizer has no token {eos_token!r}; set tokenizer.eos_token")
        self.eos, known = eos, self._inner.get_vocab_size(with_added_tokens=True)
        self.vocab_size = padded or known
        if known > self.vocab_size:
            raise DataError(
                f"the tokenizer has {known} ids, the model {padded} rows: they do not belong "
                "together; give the tokenizer of this model"
            )
        self.bos: int | None = None
        if self.beside.bos is not None:
            self.bos = self._inner.token_to_id(self.beside.bos)
        mask = self._inner.token_to_id(self.beside.mask) if self.beside.mask is not None else None
        self.token_ids = resizing_ids(self.beside.files.get(GENERATION, {}))
        self.token_ids |= {} if mask is None else {MASK: mask}
        own_ends = self.beside.ends
        self.ends = own_ends if eos in own_ends else (*own_ends, eos)

    def encode(self, text: str) -> np.ndarray:
        ids = self._inner.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each part of a text; a token over a border is the earlier part's."""
        encoded = self._inner.encode("".join(pieces), add_special_tokens=False)
        # A space that byte-level tokenizers trim leaves a token without width, at its end.
        begins = np.array([a - (a == b) for a, b in encoded.offsets], dtype=np.int64)
        borders = np.cumsum([len(piece) for piece in pieces])[:-1]
        cuts = np.searchsorted(np.maximum.accumulate(begins), borders, side="left")
        return np.split(np.array(encoded.ids, dtype=np.int32), cuts)

    def encode_with_special(self, text: str) -> np.ndarray:
        """Return the ids of `text` with the special tokens around it that tokenizer.json adds.

        A text that is written with its first special token, as a chat template writes it, gets no
        second one.
        """
        written = self.beside.bos if self.bos is not None else self.eos_token
        if text.startswith(str(written)):
            return self.encode(text)
        return np.array(self._inner.encode(text, add_special_tokens=True).ids, dtype=np.int32)

    def control_texts(self) -> list[str]:
        """See `corpus.control_texts`."""
        added = self._inner.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def encode_literally(self, text: str) -> np.ndarray:
        """See `corpus.encode_literally`."""
        return np.array(self._literal.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    @cached_property
    def _literal(self) -> Any:
        import tokenizers  # noqa: PLC0415

        inner = tokenizers.Tokenizer.from_str(self.serialised)
        inner.encode_special_tokens = True
        return inner

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def bytes_per_id(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        special = {i for i, t in self._inner.get_added_tokens_decoder().items() if t.special}
        special |= {self.eos, *self._inner.encode("", add_special_tokens=True).ids}
        byte_level = "ByteLevel" in json.dumps(json.loads(self.serialised).get("decoder"))
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            if index not in special:
                # A byte-level token spells each byte as one printable character.
                lengths[index] = len(token) if byte_level else len(_surface(token).encode())
        return lengths

    def dumps(self) -> str:
        data: dict[str, Any] = {"kind": "subword", "eos": self.eos_token, "json": self.serialised}
        if self._padded:
            data["padded"] = self._padded
        if self.beside != FolderFiles():
            data["beside"] = asdict(self.beside)
        return json.dumps(data)


def _surface(token: str) -> str:
    """Return the text of a WordPiece or Metaspace token: "ing" of `##ing`, " the" of `▁the`.

    A byte token, `<0x0A>`, gives one character.
    """
    if _BYTE_TOKEN.fullmatch(token):
        return "?"
    return token.removeprefix("##").replace("▁", " ")


_KINDS: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
    "bytes": lambda _: ByteTokenizer(),
    "char": lambda data: CharTokenizer(data["characters"]),
    "symbols": lambda data: SymbolTokenizer(data["vocab_size"]),
    "subword": lambda data: SubwordTokenizer(
        data["json"], data["eos"], data.get("padded"), _beside(data.get("beside"))
    ),
}


def _beside(data: dict[str, Any] | None) -> FolderFiles | None:
    return FolderFiles(**{**data, "ends": tuple(data["ends"])}) if data else None


def loads(data: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of this module whose `dumps` gave the JSON object `data`."""
    return _KINDS[data["kind"]](data)


def train_subwords(cfg: TokenizerConfig, documents: Iterable[str]) -> SubwordTokenizer:
    """Return the bpe, wordpiece or unigram tokenizer trained on `documents`."""
    from tokenizers import Tokenizer as Inner  # noqa: PLC0415
    from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    common: dict[str, Any] = {"vocab_size": cfg.vocab_size, "show_progress": False}
    if cfg.kind == "wordpiece":
        inner = Inner(models.WordPiece(unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        common["special_tokens"] = [cfg.eos_token, "[UNK]"]
        trainer: Any = trainers.WordPieceTrainer(**common)
    else:
        inner = Inner(models.BPE() if cfg.kind == "bpe" else models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        common["special_tokens"] = [cfg.eos_token]
        common["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        kind = trainers.BpeTrainer if cfg.kind == "bpe" else trainers.UnigramTrainer
        trainer = kind(**common)
    inner.train_from_iterator(documents, trainer)
    return SubwordTokenizer(inner.to_str(), cfg.eos_token)
