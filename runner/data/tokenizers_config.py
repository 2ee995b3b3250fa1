"""The config of a tokenizer."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.config import config
from runner.machine.errors import DataError
from runner.machine.text_files import read_text

if TYPE_CHECKING:
    from runner.data.tokenizers import Tokenizer


@config
class TokenizerConfig:
    """The kind of a tokenizer and its options.

    Args:
        kind: bytes; char (of the training text); bpe, wordpiece, unigram (trained on the training
            split); folder (a Hugging Face tokenizer folder with tokenizer.json); symbols (numbers,
            for synthetic data).
        vocab_size: of a trained tokenizer or of symbols, eos included; of kind=folder, the number
            of rows of the model (None: the number of ids).
        path: the folder of kind=folder.
        eos_token: end-of-document token of a trained or loaded tokenizer.
        train_documents: train on at most the first `train_documents` documents.
    """

    kind: Literal["bytes", "char", "bpe", "wordpiece", "unigram", "folder", "symbols"] = "bytes"
    vocab_size: int | None = None
    path: str | None = None
    eos_token: str = "<|endoftext|>"
    train_documents: int | None = None

    def __post_init__(self) -> None:
        sized = self.kind in ("bpe", "wordpiece", "unigram", "symbols")
        if sized and self.vocab_size is None:
            raise ValueError(f"tokenizer.kind={self.kind} needs tokenizer.vocab_size")
        if self.path:  # a job may start in another directory
            object.__setattr__(self, "path", str(Path(self.path).expanduser().resolve()))
        if self.kind == "folder" and not self.path:
            raise ValueError("tokenizer.kind=folder needs tokenizer.path=DIR with a tokenizer.json")

    def planned_vocab_size(self) -> int | None:
        """Return the vocabulary size, None if it depends on the text."""
        return 257 if self.kind == "bytes" else self.vocab_size

    def needs_text(self) -> bool:
        """Return whether the tokenizer is trained on the training text."""
        return self.kind in ("char", "bpe", "wordpiece", "unigram")

    def content_hash(self) -> str:
        """Return the hash of a folder's tokenizer.json, "" for other kinds.

        A trained tokenizer follows from the data, which have a hash of their own.
        """
        if self.kind != "folder":
            return ""
        return hashlib.sha256(self._file().read_bytes()).hexdigest()[:32]

    def build(self, documents: Iterable[str]) -> "Tokenizer":
        """Return the tokenizer; kinds that need text are trained on `documents`."""
        from runner.data.tokenizers import (  # noqa: PLC0415
            ByteTokenizer,
            CharTokenizer,
            SubwordTokenizer,
            SymbolTokenizer,
            train_subwords,
        )

        if self.kind == "bytes":
            return ByteTokenizer()
        if self.kind == "char":
            return CharTokenizer("".join(sorted(set().union(*documents))))
        if self.kind == "symbols":
            return SymbolTokenizer(int(self.vocab_size or 0))
        if self.kind == "folder":
            text = read_text(self._file())
            return SubwordTokenizer(text, self.eos_token, self.vocab_size)
        return train_subwords(self, documents)

    def _file(self) -> Path:
        file = Path(str(self.path)) / "tokenizer.json"
        if not file.exists():
            raise DataError(
                f"{file} does not exist; a tokenizer folder holds tokenizer.json (transformers: "
                "tokenizer.save_pretrained(DIR) with a fast tokenizer)"
            )
        return file
