"""The config of a tokenizer."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.config import config
from runner.machine.errors import DataError, EspalierError
from runner.machine.text_files import read_json, read_text

if TYPE_CHECKING:
    from runner.data.tokenizers import Tokenizer


@config
class TokenizerConfig:
    """The kind of a tokenizer and its options.

    Args:
        kind: bytes; dialogue (bytes, and a mark for each of user, assistant and tool); char (of the
            training text); bpe, wordpiece, unigram (trained on the training split); folder (a
            Hugging Face tokenizer folder with tokenizer.json); symbols (numbers, for synthetic
            data).
        vocab_size: of a trained tokenizer or of symbols, eos included; of kind=folder, the number
            of rows of the model (None: the number of ids).
        path: the folder of kind=folder.
        eos_token: end-of-document token of a trained or loaded tokenizer.
        train_documents: train on at most the first `train_documents` documents.
    """

    kind: Literal[
        "bytes", "dialogue", "char", "bpe", "wordpiece", "unigram", "folder", "symbols"
    ] = "bytes"
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
        return {"bytes": 257, "dialogue": 260}.get(self.kind, self.vocab_size)

    def named_tokens(self) -> tuple[str, ...]:
        """Return the special tokens, by our names, that a task need not add."""
        from runner.data.tokenizer_folder import named_tokens  # noqa: PLC0415

        if self.kind == "dialogue":
            return tuple(f"<{role}>" for role in ("user", "assistant", "tool"))
        return named_tokens(Path(str(self.path))) if self.kind == "folder" else ()

    def numerics_with(self, model: Any) -> int:
        """Return the numerics revision, whatever the model.

        Revision 1 left out the special tokens that a folder's tokenizer puts around a text.
        """
        return 2 if self.adds_special_tokens() else 1

    def adds_special_tokens(self) -> bool:
        """Return whether the tokenizer puts special tokens around a text."""
        from runner.data.tokenizer_folder import adds_special_tokens  # noqa: PLC0415

        return self.kind == "folder" and adds_special_tokens(self._serialised())

    def needs_text(self) -> bool:
        """Return whether the tokenizer is trained on the training text."""
        return self.kind in ("char", "bpe", "wordpiece", "unigram")

    def content_hash(self) -> str:
        """Return the hash of what a folder says of ids, "" for other kinds.

        That is tokenizer.json, and where special tokens stand around a text, which those are that
        stand before an empty one and end a generated one. A trained tokenizer follows from the
        data, which have a hash of their own.
        """
        if self.kind != "folder":
            return ""
        digest = hashlib.sha256(self._file().read_bytes())
        if self.adds_special_tokens():
            from runner.data.tokenizer_folder import read_folder  # noqa: PLC0415

            beside = read_folder(Path(str(self.path)))
            digest.update(json.dumps([beside.bos, beside.ends]).encode())
        return digest.hexdigest()[:32]

    def template_hash(self) -> str:
        """Return the hash of a folder's chat template, "" where there is none."""
        from runner.data.chat_template import template_of  # noqa: PLC0415

        template = template_of(self._read_folder()) if self.kind == "folder" else None
        return hashlib.sha256(template.encode()).hexdigest()[:32] if template else ""

    def build(self, documents: Iterable[str]) -> "Tokenizer":
        """Return the tokenizer; kinds that need text are trained on `documents`."""
        from runner.data.tokenizers import (  # noqa: PLC0415
            ByteTokenizer,
            CharTokenizer,
            SymbolTokenizer,
            train_subwords,
        )

        if self.kind == "bytes":
            return ByteTokenizer()
        if self.kind == "dialogue":
            from runner.data.special_tokens import WithTokens  # noqa: PLC0415

            return WithTokens(ByteTokenizer(), self.named_tokens())
        if self.kind == "char":
            return CharTokenizer("".join(sorted(set().union(*documents))))
        if self.kind == "symbols":
            return SymbolTokenizer(int(self.vocab_size or 0))
        if self.kind == "folder":
            return self._read_folder()
        return train_subwords(self, documents)

    def _read_folder(self) -> "Tokenizer":
        from runner.data.tokenizer_folder import read_folder  # noqa: PLC0415
        from runner.data.tokenizers import SubwordTokenizer  # noqa: PLC0415

        file = self._file()
        read_json(file)
        beside = read_folder(file.parent)
        try:
            return SubwordTokenizer(self._serialised(), self.eos_token, self.vocab_size, beside)
        except EspalierError:
            raise
        except Exception as error:  # tokenizers raises no other class
            raise DataError(
                f"{file} is no tokenizer that tokenizers reads ({error}); save it again"
            ) from error

    def _serialised(self) -> str:
        return read_text(self._file())

    def _file(self) -> Path:
        file = Path(str(self.path)) / "tokenizer.json"
        if not file.exists():
            raise DataError(
                f"{file} does not exist; a tokenizer folder holds tokenizer.json (transformers: "
                "tokenizer.save_pretrained(DIR) with a fast tokenizer)"
            )
        return file
