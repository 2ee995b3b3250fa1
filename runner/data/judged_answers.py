"""Answers as token sequences: pairs of a better and a worse one, judged solutions.

A sample holds one sequence for each answer of an example, from the beginning of the prompt, padded
on the right with `eos`. What is learnt is the answer and the token that ends it. An example that
does not fit into the sequence length is left out: half an answer is another one.

    tokens, targets    [seq] or, of pairs, [2, seq]: the chosen answer, then the rejected one
    labels             of the token's step in [0, 1], -1 outside the answer
    step_ends          whether the token is the last of a step

Cache folder, for each split: *.ids.bin, *.marks.npz, *.starts.npy.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from models.config import revision
from runner.data.chat_template import Message
from runner.data.conversation_rows import Conversation
from runner.data.conversations import Piece, Renderer, id_dtype
from runner.data.corpus import Sample, encode_pieces, prompt_ids, source_name, tokenizer_hash
from runner.data.judged_answer_rows import DROP, Answer
from runner.data.judged_answers_config import JudgedAnswersConfig
from runner.data.synthetic import generator
from runner.data.tokenizers import Tokenizer
from runner.data.tokens import cached_folder, reading_cache, refuse_changed, short_hash
from runner.machine.errors import DataError

_REVISION = 2  # raised when the same rows give other files
_NO_TARGET, _NO_LABEL = -100, -1.0


@dataclass(frozen=True)
class RenderedAnswer:
    """A prompt and its answer in ids.

    Args:
        ids: of both.
        learnt: which are of the answer or end it.
        labels: of each id's step, -1 outside the answer.
        step_ends: whether an id is the last of a step.
    """

    ids: np.ndarray
    learnt: np.ndarray
    labels: np.ndarray
    step_ends: np.ndarray


class AnswerRenderer:
    """Renders answers for one tokenizer.

    Raises:
        ConfigError: form=chat, and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, form: str) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer) if form == "chat" else None

    def render(self, answer: Answer) -> RenderedAnswer:
        """Return the ids of an answer and its prompt.

        Raises:
            DataError: the chat template fails on it, or without one the prompt is more than a text.
        """
        if self.renderer is None:
            ids, stops = self._as_text(answer)
        else:
            ids, stops = self._as_chat(self.renderer, answer)
        learnt, ends = np.arange(len(ids)) >= stops[0], np.zeros(len(ids), dtype=bool)
        labels = np.full(len(ids), _NO_LABEL, dtype=np.float32)
        ends[stops[1:] - 1] = True
        for start, stop, label in zip(stops[:-1], stops[1:], answer.labels, strict=False):
            labels[start:stop] = label
        return RenderedAnswer(ids, learnt, labels, ends)

    def _as_text(self, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, number of ids up to the end of the prompt and of each step)."""
        if len(answer.prompt) != 1:
            roles = ", ".join(message["role"] for message in answer.prompt)
            raise DataError(
                f"{answer.where}: the prompt is a conversation ({roles}), for which data.form=text "
                "has no form; give data.form=chat and a tokenizer with a chat template"
            )
        pieces = encode_pieces(self.tokenizer, _lines(answer.steps))
        pieces[-1] = np.append(pieces[-1], self.tokenizer.eos)
        encoded = [np.array(prompt_ids(self.tokenizer, answer.prompt[0]["content"])), *pieces]
        return np.concatenate(encoded), np.cumsum([len(one) for one in encoded])

    def _as_chat(self, renderer: Renderer, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        *before, last = renderer.pieces(Conversation(answer.where, answer.messages))
        hide = renderer.literals.hide
        (head, *rest), whole = _lines(hide(answer.steps)), hide(answer.text)
        start = last.text.index(whole.strip()) - len(whole) + len(whole.lstrip())
        cut = max(0, start) + len(head)
        texts = [last.text[:cut]]
        for line in rest:
            texts.append(last.text[cut : cut + len(line)])
            cut += len(line)
        texts[-1] += last.text[cut:]
        pieces = [replace(piece, learnt=False, ends=False) for piece in before]
        pieces += [Piece(text, learnt=True) for text in texts[:-1]]
        pieces.append(Piece(texts[-1], learnt=True, ends=True))
        rendered = renderer.encode(pieces, answer.where)
        return rendered.ids, rendered.stops[len(before) - 1 :]


def _lines(steps: Sequence[str]) -> list[str]:
    """Return the steps as texts which joined are the answer."""
    return [*(f"{step}\n" for step in steps[:-1]), steps[-1]]


@dataclass(frozen=True)
class AnswerSplit:
    """The answers of a split, one after the other.

    Args:
        ids, learnt, labels, step_ends: see `RenderedAnswer`.
        starts: the index of each answer's first id, and the end of the last.
        width: answers of an example.
        dropped: rows that nothing can be learnt from.
    """

    ids: np.ndarray
    learnt: np.ndarray
    labels: np.ndarray
    step_ends: np.ndarray
    starts: np.ndarray
    width: int
    dropped: int

    def fitting(self, seq: int) -> np.ndarray:
        """Return the numbers of the examples whose answers have at most `seq` ids each."""
        longest = np.diff(self.starts).reshape(-1, self.width).max(axis=1)
        return np.asarray(np.flatnonzero(longest <= seq))

    def sample(self, number: int, index: int, seq: int, eos: int) -> Sample:
        """Return example `number` as the sample `index`."""
        rows = [self._row(number * self.width + i, seq, eos) for i in range(self.width)]
        stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        sample = stacked if self.width > 1 else rows[0]
        return sample | {"index": torch.tensor(index)}

    def _row(self, answer: int, seq: int, eos: int) -> Sample:
        at = slice(int(self.starts[answer]), int(self.starts[answer + 1]))
        ids, learnt = self.ids[at].astype(np.int64), self.learnt[at]
        size = len(ids)
        tokens, targets = np.full(seq, eos), np.full(seq, _NO_TARGET)
        tokens[:size] = ids
        targets[: size - 1] = np.where(learnt[1:], ids[1:], _NO_TARGET)
        row = {"tokens": tokens, "targets": targets}
        if self.width == 1:
            labels, ends = np.full(seq, _NO_LABEL, dtype=np.float32), np.zeros(seq, dtype=bool)
            labels[:size], ends[:size] = self.labels[at], self.step_ends[at]
            row |= {"labels": labels, "step_ends": ends}
        return {key: torch.from_numpy(value) for key, value in row.items()}


class AnswerSamples(Dataset[Sample]):
    """The training set: which example is sample i is a function of (seed, i)."""

    def __init__(self, split: AnswerSplit, kept: np.ndarray, seq: int, seed: int, eos: int) -> None:
        self.split, self.kept, self.seq, self.seed, self.eos = split, kept, seq, seed, eos
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.kept))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch).permutation(self.kept)
        return self.split.sample(int(self._order[1][position]), index, self.seq, self.eos)


@dataclass(frozen=True)
class AnswerCorpus:
    """See `Corpus`."""

    tokenizer: Tokenizer
    train: AnswerSplit
    val: AnswerSplit
    bytes_per_counted_byte: float = 1.0

    def samples(self, seq: int, seed: int) -> Dataset[Sample]:
        """See `Corpus`.

        Raises:
            DataError: no example fits into `seq` tokens.
        """
        kept = self._fitting(self.train, seq, "train")
        return AnswerSamples(self.train, kept, seq, seed, self.tokenizer.eos)

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`."""
        kept = self._fitting(self.val, seq, "val")
        count = min(len(kept), max(1, max_tokens // (seq * self.val.width)))
        for start in range(0, count, batch):
            rows = [
                self.val.sample(int(kept[i]), i, seq, self.tokenizer.eos)
                for i in range(start, min(start + batch, count))
            ]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def statistics(self, seq: int) -> dict[str, float]:
        """Return how many examples each split has, how many are too long, how many dropped."""
        counts = {}
        for name, split in (("train", self.train), ("val", self.val)):
            examples = (len(split.starts) - 1) // split.width
            counts[f"{name}_examples"] = float(examples)
            counts[f"{name}_too_long"] = float(examples - len(split.fitting(seq)))
            counts[f"{name}_dropped"] = float(split.dropped)
        return counts

    def _fitting(self, split: AnswerSplit, seq: int, name: str) -> np.ndarray:
        kept = split.fitting(seq)
        if not len(kept):
            longest = int(np.diff(split.starts).min())
            raise DataError(
                f"no example of the {name} split fits into {seq} tokens, its shortest answer has "
                f"{longest}; raise train.sequence_length"
            )
        return kept


def prepare(
    data: JudgedAnswersConfig, tokenizer: Any, cache: Path, hashes: list[str] | None = None
) -> AnswerCorpus:
    """Return the corpus; what the cache does not hold yet is rendered and tokenised.

    Raises:
        ConfigError: form=chat, and the tokenizer has no chat template.
        DataError: a source has not the frozen hash, a row cannot be used, or a split is empty.
    """
    hashes = hashes if hashes is not None else data.content_hash()
    model: Tokenizer = tokenizer.build(())
    renderer = AnswerRenderer(model, data.form)
    numerics = [revision(cfg, None) for cfg in (data, tokenizer, *data.sources)]
    made = [tokenizer_hash(model), data.form, data.val_fraction, data.sequences_per_sample]
    make = partial(_write, data=data, hashes=hashes, renderer=renderer)
    key = short_hash([_REVISION, numerics, hashes, *made])
    folder = cached_folder(cache / f"answers-{key}", make)
    width = data.sequences_per_sample
    with reading_cache(folder):
        train, val = (_open(folder, split, model, width) for split in ("train", "val"))
    return AnswerCorpus(model, train, val)


def _write(
    folder: Path, data: JudgedAnswersConfig, hashes: Sequence[str], renderer: AnswerRenderer
) -> None:
    splits: dict[str, list[RenderedAnswer]] = {"train": [], "val": []}
    dropped = 0
    for source, content in zip(data.sources, hashes, strict=True):
        refuse_changed(source, content)
        for example in _rendered(source, renderer):
            if example is None:
                dropped += 1
                continue
            first, rows = example
            splits[_split(first, data.val_fraction)] += rows
    for name, rows in splits.items():
        if not rows:
            names = ", ".join(source_name(source) for source in data.sources)
            raise DataError(f"{names}: the {name} split has no example; change data.val_fraction")
        dtype = id_dtype(renderer.tokenizer)
        np.concatenate([row.ids for row in rows]).astype(dtype).tofile(folder / f"{name}.ids.bin")
        np.savez(
            folder / f"{name}.marks.npz",
            learnt=np.concatenate([row.learnt for row in rows]),
            labels=np.concatenate([row.labels for row in rows]),
            step_ends=np.concatenate([row.step_ends for row in rows]),
            dropped=dropped if name == "train" else 0,
        )
        np.save(folder / f"{name}.starts.npy", np.cumsum([0, *(len(row.ids) for row in rows)]))


def _rendered(
    source: Any, renderer: AnswerRenderer
) -> Iterator[tuple[Answer, list[RenderedAnswer]] | None]:
    """Yield (the first answer, all answers in ids) of each example, None for one that is dropped.

    Raises:
        DataError: the two answers of a pair have the same ids: a template may strip them.
    """
    for answers in source.examples():
        rows = [renderer.render(answer) for answer in answers or ()]
        if len(rows) == 2 and np.array_equal(rows[0].ids, rows[1].ids):
            if source.unusable == "refuse":
                raise DataError(
                    f"{answers[0].where}: chosen and rejected have the same tokens, nothing can be "
                    f"learnt from them; {DROP}"
                )
            rows = []
        yield (answers[0], rows) if rows else None


def held_out_prompts(data: JudgedAnswersConfig) -> Iterator[tuple[Message, ...]]:
    """Yield the prompt of each held-out example, in the order of the sources."""
    for source in data.sources:
        for answers in source.examples():
            if answers and _split(answers[0], data.val_fraction) == "val":
                yield answers[0].prompt


def _split(answer: Answer, val_fraction: float) -> str:
    """Return the split of a prompt: all answers to it are on one side."""
    digest = hashlib.sha256(json.dumps(answer.prompt).encode()).digest()
    return "val" if int.from_bytes(digest[:4], "little") / 2**32 < val_fraction else "train"


def _open(folder: Path, name: str, model: Tokenizer, width: int) -> AnswerSplit:
    ids = np.memmap(folder / f"{name}.ids.bin", dtype=id_dtype(model), mode="r")
    with np.load(folder / f"{name}.marks.npz") as marks:
        held = {key: marks[key] for key in ("learnt", "labels", "step_ends")}
        dropped = int(marks["dropped"])
    starts = np.load(folder / f"{name}.starts.npy")
    return AnswerSplit(ids, **held, starts=starts, width=width, dropped=dropped)
