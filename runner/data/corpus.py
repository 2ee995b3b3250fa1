"""The attributes that data sets, sources and tokenizers need; optional ones have a default here.

data       config.build(tokenizer_config, cache, hashes) -> Corpus
           optional: content_hash() -> [hash], check(tokenizer_config, seq), mask_documents,
           num_workers, bidirectional_prompt, sequences_per_sample (of seq tokens each),
           planned_batch(samples, seq) -> a batch of zeros, to plan memory by, reads_template:
           whether the text hangs on the tokenizer's chat template
corpus     tokenizer, samples(seq, seed), held_out(seq, batch, max_tokens)
           optional: bytes_per_counted_byte, statistics(seq) -> {name: number} for the journal
source     of data.sources: documents() -> texts; optional: weight, content_hash() -> hash of texts
           that do not follow from the config alone
tokenizer  config.build(documents) -> Tokenizer
           optional: planned_vocab_size(), needs_text(), content_hash() -> hash, named_tokens(),
           template_hash() -> hash of the chat template
Tokenizer  vocab_size, eos, encode(text) -> ids, decode(ids) -> text, dumps() -> JSON whose
           "_target_" names a class with loads(text) -> Tokenizer; optional: bytes_per_id(),
           encode_with_special(text) -> ids, encode_pieces(texts) -> [ids], bos, ends, token_ids,
           num_added, control_texts() -> [text], encode_literally(text) -> ids
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from models.config import numerics_of, plain, released_name
from runner.machine.errors import DataError
from runner.machine.system_errors import reading
from runner.machine.text_files import as_text, read_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Sample = dict[str, Tensor]
else:
    Sample = dict


class Samples(Protocol):
    """An endless training set; a `torch.utils.data.Dataset`, or a class that inherits nothing."""

    def __getitem__(self, index: int, /) -> Sample:
        """Return sample `index`.

        It holds int64 tensors: `tokens`, `targets` (-100: not counted) and, where there are any,
        `documents` (the index of each token's document), each [seq], and `index`, the number.
        """


class Corpus(Protocol):
    """Data to train and validate on."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of its ids."""

    def samples(self, seq: int, seed: int) -> Samples:
        """Return the training set."""

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """Yield the validation batches, the same at every call, of at most `max_tokens` tokens."""


def bytes_per_counted_byte(corpus: Any) -> float:
    """Return bytes of validation text per byte that its tokens spell; 1 if nothing is lost."""
    return float(getattr(corpus, "bytes_per_counted_byte", 1.0))


def prompt_sees_itself(data: Any) -> bool:
    """Return whether a config of data trains on prompts whose tokens see each other; default: no.

    Samples then have `spans` besides: ids of given stretches, 0 elsewhere.
    """
    return bool(getattr(data, "bidirectional_prompt", False))


def refuse_several_sequences(data: Any, task: str) -> None:
    """Raise ValueError if a sample of a config of data holds several sequences.

    Args:
        task: the name of the task that learns one from each.
    """
    if getattr(data, "sequences_per_sample", 1) != 1:
        raise ValueError(
            f"task={task} learns single sequences, and the samples of {type(data).__name__} hold "
            "several; give task=preference, or other data"
        )


def statistics(corpus: Any, seq: int) -> dict[str, float]:
    """Return counts of what a corpus gives in sequences of `seq`, for the journal; default: {}."""
    own = getattr(corpus, "statistics", None)
    return dict(own(seq)) if own is not None else {}


def planned_vocab_size(tokenizer: Any, added: Sequence[str] = ()) -> int | None:
    """Return the vocabulary size of a tokenizer's config, None if it depends on the text.

    Args:
        added: special tokens that a task needs; those that the tokenizer lacks count.
    """
    planned = getattr(tokenizer, "planned_vocab_size", None)
    size: int | None = planned() if planned is not None else None
    if size is None or not added:
        return size
    named = getattr(tokenizer, "named_tokens", None)
    known = named() if named is not None else ()
    return size + sum(name not in known for name in added)


def needs_text(tokenizer: Any) -> bool:
    """Return whether the tokenizer of a config is trained on the training text; default: no."""
    needs = getattr(tokenizer, "needs_text", None)
    return bool(needs()) if needs is not None else False


def content_hash(cfg: Any) -> Any:
    """Return the hash (a list of hashes for a data set) of what a config reads, None if nothing."""
    own_hash = getattr(cfg, "content_hash", None)
    return own_hash() if own_hash is not None else None


def source_hash(source: Any) -> str:
    """Return what identifies the documents of a source: its `content_hash`.

    By default they follow from its config: its class and the fields that can change them.
    """
    own_hash = content_hash(source)
    if own_hash is not None:
        return str(own_hash)
    given = {item.name: item.metadata for item in fields(source) if item.name != "weight"}
    values = {
        name: plain(getattr(source, name), target=True)
        for name, said in given.items()
        if not said.get("execution") and getattr(source, name) not in said.get("neutral", ())
    }
    key = [released_name(type(source)), numerics_of(type(source)), values]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def documents(source: Any) -> Iterator[str]:
    """Yield the documents of a source.

    Raises:
        DataError: the source cannot be read, or a document is no text.
    """
    name = source_name(source)
    with reading(name):
        for number, text in enumerate(source.documents(), start=1):
            yield as_text(text, f"{name}, document {number}")


def source_weight(source: Any) -> float:
    """Return a source's share of the training samples relative to the others; default: 1."""
    return float(getattr(source, "weight", 1.0))


def source_name(source: Any) -> str:
    """Return the name of a source for people to read: its path, else its format or class."""
    name = getattr(source, "path", None) or getattr(source, "format", None)
    return str(name or type(source).__name__)


def bytes_per_id(tokenizer: Any) -> "np.ndarray":
    """Return the UTF-8 length of the text of each id, [vocab_size] int32.

    By default it is that of the id decoded alone, 0 for `eos`.
    """
    import numpy as np  # noqa: PLC0415

    own_lengths = getattr(tokenizer, "bytes_per_id", None)
    if own_lengths is not None:
        return np.asarray(own_lengths())
    lengths = [len(tokenizer.decode([index]).encode()) for index in range(tokenizer.vocab_size)]
    lengths[tokenizer.eos] = 0
    return np.array(lengths, dtype=np.int32)


def encode_with_special(tokenizer: Any, text: str) -> "np.ndarray":
    """Return the ids of a text with the special tokens that its tokenizer puts around it.

    By default it puts none.
    """
    encode = getattr(tokenizer, "encode_with_special", tokenizer.encode)
    ids: np.ndarray = encode(text)
    return ids


def encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> "list[np.ndarray]":
    """Return the ids of each part of a text, which joined are the ids of the text.

    By default the parts are encoded one by one.
    """
    encode = getattr(tokenizer, "encode_pieces", None)
    return list(encode(pieces)) if encode else [tokenizer.encode(piece) for piece in pieces]


def control_texts(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer reads as special tokens (`<|im_end|>`); default: none."""
    texts = getattr(tokenizer, "control_texts", None)
    return list(texts()) if texts is not None else []


def encode_literally(tokenizer: Any, text: str) -> "np.ndarray":
    """Return the ids of a text in which special tokens are spelt like any other word."""
    ids: np.ndarray = getattr(tokenizer, "encode_literally", tokenizer.encode)(text)
    return ids


def start_id(tokenizer: Any) -> int:
    """Return the id that stands before an empty text: `bos` if there is one, else `eos`."""
    bos = getattr(tokenizer, "bos", None)
    return int(tokenizer.eos if bos is None else bos)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that a model goes on from; `start_id` for a text without ids."""
    return [int(index) for index in encode_with_special(tokenizer, text)] or [start_id(tokenizer)]


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a text that a model generates; default: `eos`."""
    return tuple(getattr(tokenizer, "ends", ())) or (tokenizer.eos,)


def token_id(tokenizer: Any, name: str) -> int | None:
    """Return the id of the special token `name` (`<mask>`), None if the tokenizer has none."""
    known: Mapping[str, int] = getattr(tokenizer, "token_ids", {})
    return known.get(name)


def num_added(tokenizer: Any) -> int:
    """Return the number of special tokens after a tokenizer's own ids, which a task has added."""
    return int(getattr(tokenizer, "num_added", 0))


def token_texts(tokenizer: Any) -> list[str]:
    """Return the text of each id, `<id>` where it is empty or a part of a character."""
    return texts_of(tokenizer, range(tokenizer.vocab_size))


def texts_of(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Return the text of each of `ids`, `<id>` where it is empty or a part of a character."""
    decoded = [(index, tokenizer.decode([index])) for index in ids]
    return [t if t and "\ufffd" not in t else f"<{index}>" for index, t in decoded]


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of a tokenizer's `dumps`, 32 hex digits."""
    return hashlib.sha256(tokenizer.dumps().encode()).hexdigest()[:32]


def load_tokenizer(file: Path) -> Any:
    """Return the tokenizer whose `dumps` a file holds, one of ours or a user's class.

    Raises:
        DataError: the file is missing or damaged.
    """
    text = read_text(file)
    try:
        return loads(text)
    except Exception as error:  # whatever the class of the tokenizer raises
        raise DataError(
            f"{file} is no tokenizer that this installation reads ({error!r:.200}); restore it"
        ) from error


def loads(text: str) -> Any:
    """Return the tokenizer whose `dumps` returned `text`, one of ours or a user's class."""
    from models.config import target_class  # noqa: PLC0415

    data: dict[str, Any] = json.loads(text)
    if "_target_" in data:
        return target_class(data["_target_"]).loads(text)
    from runner.data import tokenizers  # noqa: PLC0415

    return tokenizers.loads(data)
