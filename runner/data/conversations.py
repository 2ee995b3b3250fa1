"""Conversations as token sequences with a mask, packed into windows.

    rendered   by marks for the roles, or by the tokenizer's chat template, turn by turn; what each
               turn adds must be a continuation of the text before, so that the mask is that of the
               whole
    learnt     an answer's text and the token that ends it
    packed     best fit, longest first; attention stays inside a conversation

Cache folder, for each split: *.ids.bin, *.learnt.bin (bool), *.offsets.npy.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from models.config import revision
from runner.data.chat_template import ChatTemplate, Literals
from runner.data.conversation_rows import Conversation, conversations, parts_of_answer
from runner.data.conversations_config import ConversationsConfig
from runner.data.corpus import Sample, encode_pieces, end_ids, source_name, tokenizer_hash
from runner.data.dialogue_format import DialogueFormat, dialogue_format, given_spans
from runner.data.synthetic import generator
from runner.data.tokenizers import Tokenizer
from runner.data.tokens import cached_folder, reading_cache, refuse_changed, short_hash
from runner.machine.errors import DataError

_REVISION = 2  # raised when the same conversations give other files
_NO_TARGET = -100


@dataclass(frozen=True)
class Rendered:
    """A conversation in ids: `learnt[i]` says whether id i is to be predicted.

    Args:
        stops: the number of ids up to the end of each piece that it was rendered from.
    """

    ids: np.ndarray
    learnt: np.ndarray
    stops: np.ndarray


@dataclass(frozen=True)
class Piece:
    """A part of a conversation's text: whether it is learnt, whether a turn ends with it.

    Args:
        answer: whether the turn is the assistant's, which must end with a token that ends a text.
    """

    text: str
    learnt: bool = False
    ends: bool = False
    answer: bool = True


class Renderer:
    """Renders conversations for one tokenizer.

    Args:
        loss_on: the roles whose turns are learnt, each with the token that ends it.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, loss_on: Sequence[str] = ("assistant",)) -> None:
        self.tokenizer, self.template = tokenizer, ChatTemplate(tokenizer)
        self.literals = Literals(tokenizer)
        self.loss_on = frozenset(loss_on)
        self.ends = np.array(end_ids(tokenizer))

    def render(self, conversation: Conversation) -> Rendered:
        """Return the ids of a conversation up to the end of its last answer.

        Raises:
            DataError: the template fails on it, changes what it wrote before when a turn is added,
                or ends an answer with no token that ends a text.
        """
        return self.encode(list(self.pieces(conversation)), conversation.where)

    def encode(self, pieces: Sequence[Piece], where: str) -> Rendered:
        """Return the ids of the parts of a conversation up to the last that is learnt.

        Raises:
            DataError: an answer ends with no token that ends a text.
        """
        texts = [piece.text for piece in pieces]
        if any(self.literals.are_in(text) for text in texts):
            encoded = [np.array(self.literals.ids(self.tokenizer, t), dtype=int) for t in texts]
        else:
            encoded = encode_pieces(self.tokenizer, texts)
        masks = []
        for ids, piece in zip(encoded, pieces, strict=True):
            mask = np.full(len(ids), piece.learnt)
            if piece.ends:  # what the template writes after the end, a line break, is not learnt
                ends = np.flatnonzero(np.isin(ids, self.ends))
                if not len(ends) and piece.answer:
                    raise DataError(
                        f"{where}: the tokenizer's chat template ends an answer with "
                        f"none of the ids {self.ends.tolist()}, which end a text; a model would "
                        "never learn to stop"
                    )
                mask[ends[-1] + 1 if len(ends) else len(ids) :] = False
            masks.append(mask)
        ids, mask = np.concatenate(encoded), np.concatenate(masks)
        last = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        stops = np.minimum(np.cumsum([len(one) for one in encoded]), last)
        return Rendered(ids[:last], mask[:last], stops)

    def pieces(self, conversation: Conversation) -> Iterator[Piece]:
        """Yield the parts of the text of a conversation, in order.

        Raises:
            DataError: the template fails, or changes what it wrote before when a turn is added.
        """
        messages, where = self.literals.hide(conversation.messages), conversation.where
        before = ""
        for number, message in enumerate(messages, start=1):
            is_answer, learnt = message["role"] == "assistant", message["role"] in self.loss_on
            if not (is_answer or learnt):
                continue
            head = ""
            if is_answer:
                head = self.template.render(
                    messages[: number - 1], add_generation_prompt=True, where=where
                )
            whole = self.template.render(messages[:number], where=where)
            if not is_answer:  # it begins where its text does
                head = whole[: max(0, whole.find(message["content"].strip(), len(before)))]
            if not head.startswith(before) or not whole.startswith(head):
                raise DataError(
                    f"{where}, message {number}: the tokenizer's chat template does not write this "
                    "turn after what it wrote before; a mask of the turns cannot be made. Take a "
                    "template that only adds text"
                )
            yield Piece(head[len(before) :])
            answer = whole[len(head) :]
            if message["content"].strip() not in answer:
                raise DataError(
                    f"{where}, message {number}: the tokenizer's chat template leaves out a part "
                    "of the answer; take a template that writes it as it is"
                )
            *parts, (rest, _) = parts_of_answer(answer, calls=conversation.calls)
            for text, given in parts:
                yield Piece(text, learnt=learnt and not given)
            yield Piece(rest, learnt=learnt, ends=True, answer=is_answer)
            before = whole


@dataclass(frozen=True)
class Split:
    """The conversations of a split, memory-mapped.

    Args:
        ids, learnt: of all conversations, one after the other.
        starts: the index of each conversation's first id, and the end of the last.
    """

    ids: np.ndarray
    learnt: np.ndarray
    starts: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of ids of each conversation."""
        return np.diff(self.starts)

    def targets_within(self, seq: int) -> np.ndarray:
        """Return the number of targets in the first `seq` + 1 ids of each conversation."""
        ends = np.minimum(self.starts[:-1] + seq + 1, self.starts[1:])
        so_far = np.concatenate([[0], np.cumsum(self.learnt)])
        return np.asarray(so_far[ends] - so_far[self.starts[:-1]])


@dataclass(frozen=True)
class Counts:
    """What became of the conversations of a split in windows of a length.

    Args:
        conversations: all that were read.
        truncated: longer than the window: their ends are cut off.
        dropped: without a target in the window, so left out.
        windows: the packed sequences.
        targets: ids that are learnt.
        padding: share of the windows' positions that hold no conversation.
    """

    conversations: int
    truncated: int
    dropped: int
    windows: int
    targets: int
    padding: float


class Windows:
    """The conversations of a split packed into windows of `seq` tokens.

    Args:
        spans: say of each token to which given stretch it belongs; see `given_spans`.
    """

    def __init__(self, split: Split, seq: int, eos: int, *, spans: bool = False) -> None:
        self.split, self.seq, self.eos, self.spans = split, seq, eos, spans
        targets = split.targets_within(seq)
        kept = np.flatnonzero(targets)
        inputs = np.minimum(split.lengths[kept] - 1, seq)  # the last id is a target only
        self.bins = [[int(kept[i]) for i in one] for one in best_fit(inputs.tolist(), seq)]
        self.counts = Counts(
            conversations=len(split.lengths),
            truncated=int((split.lengths[kept] > seq + 1).sum()),
            dropped=len(split.lengths) - len(kept),
            windows=len(self.bins),
            targets=int(targets.sum()),
            padding=1.0 - float(inputs.sum()) / max(1, len(self.bins) * seq),
        )

    def window(self, number: int, index: int) -> Sample:
        """Return window `number` as the sample `index`."""
        tokens, targets = np.full(self.seq, self.eos), np.full(self.seq, _NO_TARGET)
        documents = np.full(self.seq, len(self.bins[number]))  # the padding's, last
        spans, at = np.zeros(self.seq, dtype=np.int64), 0
        for document, conversation in enumerate(self.bins[number]):
            start, end = self.split.starts[conversation : conversation + 2]
            ids = self.split.ids[start : min(end, start + self.seq + 1)].astype(np.int64)
            learnt = self.split.learnt[start : start + len(ids)]
            stop = at + len(ids) - 1
            tokens[at:stop], documents[at:stop] = ids[:-1], document
            targets[at:stop] = np.where(learnt[1:], ids[1:], _NO_TARGET)
            own = given_spans(np.asarray(learnt))[:-1]
            spans[at:stop] = np.where(own > 0, own + spans.max(), 0)
            at = stop
        sample = {"tokens": tokens, "targets": targets, "documents": documents}
        sample |= {"spans": spans} if self.spans else {}
        return {k: torch.from_numpy(v) for k, v in sample.items()} | {"index": torch.tensor(index)}


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return bins of at most `size`, each a list of indices into `lengths`, none above `size`.

    Longest first, each goes where the least room stays (best-fit decreasing); a function of the
    lengths alone.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # numbers of bins by room left
    rooms = 0  # bit r is set where there is a bin with room r: finding the least is one shift
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        above = rooms >> length
        if above:
            room = length + (above & -above).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = size, len(bins)
            bins.append([])
        bins[number].append(index)
        left = room - length
        with_room[left].append(number)
        rooms |= 1 << left
    return bins


class ConversationSamples(Dataset[Sample]):
    """The training set: which window is sample i is a function of (seed, i)."""

    def __init__(self, windows: Windows, seed: int) -> None:
        self.windows, self.seed = windows, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: int) -> Sample:
        count = len(self.windows.bins)
        epoch, position = divmod(index, count)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch).permutation(count)
        return self.windows.window(int(self._order[1][position]), index)


@dataclass(frozen=True)
class ConversationCorpus:
    """See `Corpus`."""

    tokenizer: Tokenizer
    train: Split
    val: Split
    spans: bool = False
    bytes_per_counted_byte: float = 1.0

    def samples(self, seq: int, seed: int) -> Dataset[Sample]:
        """See `Corpus`: packed windows.

        Raises:
            DataError: no conversation has a target within `seq` tokens.
        """
        windows = self._windows(self.train, seq, "train")
        return ConversationSamples(windows, seed)

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`."""
        windows = self._windows(self.val, seq, "val")
        count = min(len(windows.bins), max(1, max_tokens // seq))
        for start in range(0, count, batch):
            rows = [
                windows.window(number, number) for number in range(start, min(start + batch, count))
            ]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def statistics(self, seq: int) -> dict[str, float]:
        """Return the `Counts` of both splits in windows of `seq`, by {split}_{count}."""
        return {
            f"{name}_{key}": value
            for name, split in (("train", self.train), ("val", self.val))
            for key, value in asdict(self._windows(split, seq, name).counts).items()
        }

    def _windows(self, split: Split, seq: int, name: str) -> Windows:
        windows = Windows(split, seq, self.tokenizer.eos, spans=self.spans)
        if not windows.bins:
            raise DataError(
                f"none of the {len(split.lengths)} conversations of the {name} split has an answer "
                f"within {seq} tokens; raise train.sequence_length"
            )
        return windows


def prepare(
    data: ConversationsConfig, tokenizer: Any, cache: Path, hashes: list[str] | None = None
) -> ConversationCorpus:
    """Return the corpus; what the cache does not hold yet is rendered and tokenised.

    Raises:
        ConfigError: the tokenizer has neither marks for the roles nor a chat template.
        DataError: a source has not the frozen hash, a conversation cannot be used, or a split is
            empty.
    """
    hashes = hashes if hashes is not None else data.content_hash()
    model: Tokenizer = tokenizer.build(())
    form = dialogue_format(model, data.loss_on)
    numerics = [revision(cfg, None) for cfg in (data, tokenizer, *data.sources)]
    key: list[Any] = [_REVISION, numerics, hashes, tokenizer_hash(model), data.val_fraction]
    key += [] if data.loss_on == ("assistant",) else [data.loss_on]
    make = partial(_write, data=data, hashes=hashes, form=form, dtype=id_dtype(model))
    folder = cached_folder(cache / f"conversations-{short_hash(key)}", make)
    with reading_cache(folder):
        train, val = (_open(folder, split, model) for split in ("train", "val"))
    return ConversationCorpus(model, train, val, data.bidirectional_prompt)


def _write(
    folder: Path,
    data: ConversationsConfig,
    hashes: Sequence[str],
    form: DialogueFormat,
    dtype: type[np.unsignedinteger[Any]],
) -> None:
    splits: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "val": []}
    for source, content in zip(data.sources, hashes, strict=True):
        refuse_changed(source, content)
        for conversation in conversations(source):
            rendered = form.render(
                conversation.messages, where=conversation.where, calls=conversation.calls
            )
            digest = hashlib.sha256(json.dumps(conversation.messages).encode()).digest()
            held_out = int.from_bytes(digest[:4], "little") / 2**32 < data.val_fraction
            splits["val" if held_out else "train"] += [rendered] * (
                1 if held_out else source.repeats
            )
    for name, rows in splits.items():
        if not rows:
            names = ", ".join(source_name(source) for source in data.sources)
            rest = sum(map(len, splits.values()))
            way_out = "change data.val_fraction" if rest else "there is none at all in the files"
            raise DataError(f"{names}: the {name} split has no conversation; {way_out}")
        np.concatenate([ids for ids, _ in rows]).astype(dtype).tofile(folder / f"{name}.ids.bin")
        np.concatenate([learnt for _, learnt in rows]).tofile(folder / f"{name}.learnt.bin")
        np.save(folder / f"{name}.offsets.npy", np.cumsum([0, *(len(ids) for ids, _ in rows)]))


def _open(folder: Path, name: str, model: Tokenizer) -> Split:
    ids = np.memmap(folder / f"{name}.ids.bin", dtype=id_dtype(model), mode="r")
    learnt = np.memmap(folder / f"{name}.learnt.bin", dtype=np.bool_, mode="r")
    return Split(ids, learnt, np.load(folder / f"{name}.offsets.npy"))


def id_dtype(model: Tokenizer) -> type[np.unsignedinteger[Any]]:
    """Return the type that the ids of a tokenizer are stored in."""
    return np.uint16 if model.vocab_size <= 2**16 else np.uint32
