"""Token files: each source tokenised once, memory-mapped by every cell that needs it.

A cache folder is named by content and tokenizer hash and appears by one rename, so that many cells
may start together: each writes its own temporary folder and the first rename wins.

Folder: train.bin, val.bin (ids, uint16 or uint32), *.offsets.npy (document starts), bytes.json
(bytes of text in each split, and as the tokenizer counts them).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from typing_extensions import TypedDict

from models.config import plain, revision
from runner.data.corpus import (
    Sample,
    bytes_per_id,
    content_hash,
    documents,
    encode_with_special,
    load_tokenizer,
    needs_text,
    source_hash,
    source_name,
    source_weight,
    tokenizer_hash,
)
from runner.data.order import TrainingSamples, validation_batches
from runner.data.tokenizer_folder import read_folder
from runner.data.tokenizers import Tokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.data.tokens_config import DataConfig
from runner.machine.errors import DataError, EspalierError
from runner.machine.storage import unfinished_name
from runner.machine.system_errors import write_error
from runner.machine.typed_json import read_record

# Raised when the same text gives other files, whatever the `numerics` of data, sources and
# tokenizer: those in a cache are made anew.
_TOKENIZER_REVISION = 2  # revision 1 trained on all of a source's only document
_TOKENS_REVISION = 2


@dataclass(frozen=True)
class TokenFile:
    """One tokenised split of one source, memory-mapped.

    Args:
        ids: of all documents, each ended by eos.
        starts: the index in `ids` of each document's first token, ascending.
        text_bytes: UTF-8 bytes of the text.
        counted_bytes: bytes that the ids stand for, less where the tokenizer drops some.
    """

    ids: np.ndarray
    starts: np.ndarray
    text_bytes: int = 0
    counted_bytes: int = 0

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (`length` ids from index `start`, the document index of each), int64."""
        position = np.arange(start, start + length)
        documents = np.searchsorted(self.starts, position, side="right")
        return self.ids[start : start + length].astype(np.int64), documents


@dataclass(frozen=True)
class TextCorpus:
    """The tokenised sources, a train and a val file for each; see `Corpus`."""

    tokenizer: Tokenizer
    train: list[TokenFile]
    val: list[TokenFile]
    weights: list[float]

    @property
    def bytes_per_counted_byte(self) -> float:
        """Bytes of validation text per byte that its tokens spell; 1 for a lossless tokenizer."""
        counted = sum(file.counted_bytes for file in self.val)
        return sum(file.text_bytes for file in self.val) / counted if counted else 1.0

    def samples(self, seq: int, seed: int) -> Dataset[Sample]:
        """See `Corpus`: windows of the token stream."""
        return TrainingSamples(self.train, self.weights, seq, seed, self.tokenizer.eos)

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`."""
        return validation_batches(self.val, seq, batch, max_tokens)


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, cache: Path, hashes: list[str] | None = None
) -> TextCorpus:
    """Return the corpus, tokenising the sources that `cache` does not hold yet.

    Args:
        hashes: the sources' content hashes, frozen with the cell (None: computed now). Text whose
            tokens are cached is not read.

    Raises:
        DataError: a source's text does not have the frozen hash.
    """
    hashes = hashes if hashes is not None else data.content_hash()
    trained_on = hashes if needs_text(tokenizer) else []
    tokenizer_key = [
        _tokenizer_key(tokenizer),
        content_hash(tokenizer) or "",
        trained_on,
        _split_key(data),
        [revision(cfg, None) for cfg in (data, tokenizer, *(data.sources if trained_on else ()))],
        *([_TOKENIZER_REVISION] if trained_on else []),
    ]
    folder = cached_folder(
        cache / f"tokenizer-{short_hash(tokenizer_key)}",
        lambda f: _train_tokenizer(f, data, hashes, tokenizer),
    )
    with reading_cache(folder):
        model: Tokenizer = load_tokenizer(folder / "tokenizer.json")
    train, val = [], []
    for source, content in zip(data.sources, hashes, strict=True):
        numerics = [revision(cfg, None) for cfg in (data, tokenizer, source)]
        key = [_TOKENS_REVISION, numerics, content, tokenizer_hash(model), _split_key(data)]
        cached = cache / f"tokens-{short_hash(key)}"
        make = partial(_tokenise, source=source, content=content, data=data, model=model)
        folder = cached_folder(cached, make)
        with reading_cache(folder):
            train.append(_open_split(folder, "train", model))
            val.append(_open_split(folder, "val", model))
    return TextCorpus(model, train, val, [source_weight(source) for source in data.sources])


@contextmanager
def reading_cache(folder: Path) -> Iterator[None]:
    """Say of a folder of the cache that cannot be read that it may be deleted."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"{error}; delete {folder}: the next run makes it again") from error


def short_hash(key: list[Any]) -> str:
    """Return the hash of a key, JSON data, that names a folder of the cache."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def refuse_changed(source: Any, frozen: str) -> None:
    """Raise DataError if the content of `source` has not the hash `frozen`."""
    if source_hash(source) != frozen:
        raise DataError(
            f"{source_name(source)} has changed since the cell was frozen; put the text back, or "
            "run the sweep again: the new text makes a new cell"
        )


def _tokenizer_key(tokenizer: Any) -> list[Any]:
    if not isinstance(tokenizer, TokenizerConfig):
        return [plain(tokenizer, target=True)]
    key: list[Any] = [
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.eos_token,
        tokenizer.train_documents,
    ]
    if tokenizer.kind == "folder":  # what an export gives back, though no id depends on it
        key.append(asdict(read_folder(Path(str(tokenizer.path)))))
    return key


def _split_key(data: DataConfig) -> str:
    return f"{data.split}:{data.val_fraction}"


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `make` and renamed into place if it does not exist."""
    if folder.exists():
        return folder
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_name(folder)
        unfinished.mkdir()
        make(unfinished)
        os.rename(unfinished, folder)
    except OSError as error:
        if isinstance(error, EspalierError):
            raise
        if not folder.exists():
            raise write_error(folder, error) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _train_tokenizer(
    folder: Path, data: DataConfig, hashes: list[str], tokenizer: TokenizerConfig
) -> None:
    def training_texts() -> Iterator[str]:
        left = getattr(tokenizer, "train_documents", None)
        for source, content in zip(data.sources, hashes, strict=True):
            refuse_changed(source, content)
            for head, _ in _split_documents(source, data):
                if head and left != 0:
                    left = None if left is None else left - 1
                    yield head

    built = tokenizer.build(training_texts())
    (folder / "tokenizer.json").write_text(built.dumps(), encoding="utf-8")


def _split_documents(source: Any, data: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield (training text, validation text) of each document, of which one may be empty.

    A source of a single document is split at its tail: by its hash one half would be empty.
    """
    texts = documents(source)
    first = list(islice(texts, 2))
    tail = data.split == "tail" or len(first) == 1
    for text in chain(first, texts):
        yield _split_document(text, data.val_fraction, tail=tail)


def _split_document(text: str, val_fraction: float, *, tail: bool) -> tuple[str, str]:
    if tail:
        cut = int(len(text) * (1.0 - val_fraction))
        return text[:cut], text[cut:]
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") / 2**32
    return ("", text) if draw < val_fraction else (text, "")


def _tokenise(folder: Path, source: Any, content: str, data: DataConfig, model: Tokenizer) -> None:
    refuse_changed(source, content)
    dtype = np.uint16 if model.vocab_size <= 2**16 else np.uint32
    starts: dict[str, list[int]] = {"train": [], "val": []}
    length, size, counted = ({"train": 0, "val": 0} for _ in range(3))
    lengths, added = bytes_per_id(model), len(encode_with_special(model, "")) > 0
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        for parts in _split_documents(source, data):
            for split, part in zip(("train", "val"), parts, strict=True):
                if part:
                    ids = encode_with_special(model, part).astype(dtype)
                    if not (added and len(ids) and ids[-1] == model.eos):
                        ids = np.append(ids, np.array(model.eos, dtype))
                    starts[split].append(length[split])
                    length[split] += len(ids)
                    size[split] += len(part.encode())
                    counted[split] += int(lengths[ids].sum())
                    ids.tofile(files[split])
    (folder / "bytes.json").write_text(json.dumps({"text": size, "counted": counted}))
    for split, count in length.items():
        if not count:
            raise DataError(
                f"{source_name(source)}: the {split} split is empty ({len(starts['train'])} "
                "training documents); use data.split=tail or another data.val_fraction"
            )
        np.save(folder / f"{split}.offsets.npy", np.array(starts[split], dtype=np.int64))


class _Sizes(TypedDict):
    train: int
    val: int


class _Bytes(TypedDict):
    text: _Sizes
    counted: _Sizes


def _open_split(folder: Path, split: str, model: Tokenizer) -> TokenFile:
    dtype = np.uint16 if model.vocab_size <= 2**16 else np.uint32
    ids = np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r")
    known = read_record(folder / "bytes.json", _Bytes)
    starts = np.load(folder / f"{split}.offsets.npy")
    return TokenFile(ids, starts, known["text"][split], known["counted"][split])
