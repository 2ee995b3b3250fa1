"""Problems as sequences: a prompt, of which nothing is learnt, and a solution with its end.

A problem has a sequence to itself, padded by eos: what is generated for it stands in its place.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kernels.logit_rows import IGNORE
from runner.data.corpus import (
    Sample,
    encode_pieces,
    encode_with_special,
    needs_text,
    source_name,
)
from runner.data.problems_config import Problem, ProblemsConfig
from runner.data.synthetic import generator
from runner.data.tokens import refuse_changed
from runner.machine.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """The ids of a problem, of which the first `given` are the prompt; eos ends them."""

    ids: np.ndarray
    given: int


class ProblemSamples(Dataset[Sample]):
    """The training set: which problem is sample i is a function of (seed, i)."""

    def __init__(self, problems: Sequence[Encoded], seq: int, seed: int, eos: int) -> None:
        self.problems, self.seq, self.seed, self.eos = problems, seq, seed, eos
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.problems))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, generator(self.seed, epoch).permutation(len(self.problems))
        return to_sample(self.problems[self._order[1][position]], self.seq, self.eos, index)


@dataclass(frozen=True)
class ProblemCorpus:
    """See `Corpus`.

    Args:
        train, val: the problems of each split.
        bytes_per_counted_byte: of the text, see `runner.data.corpus`.
    """

    tokenizer: Any
    train: Sequence[Encoded]
    val: Sequence[Encoded]
    bytes_per_counted_byte: float = 1.0

    def samples(self, seq: int, seed: int) -> Dataset[Sample]:
        """See `Corpus`; a problem that is longer than a sequence is left out.

        Raises:
            DataError: all are.
        """
        fitting = self._fitting(self.train, seq, "train")
        return ProblemSamples(fitting, seq, seed, self.tokenizer.eos)

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`: the first problems of the split that fit, at most `max_tokens`."""
        fitting = self._fitting(self.val, seq, "val")[: max(1, max_tokens // seq)]
        for start in range(0, len(fitting), batch):
            rows = [
                to_sample(fitting[number], seq, self.tokenizer.eos, number)
                for number in range(start, min(start + batch, len(fitting)))
            ]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def statistics(self, seq: int) -> dict[str, float]:
        """Return the problems of each split, and how many are too long for `seq`."""
        counts: dict[str, float] = {}
        for name, split in (("train", self.train), ("val", self.val)):
            counts[f"{name}_problems"] = len(split)
            counts[f"{name}_too_long"] = sum(len(one.ids) > seq + 1 for one in split)
        return counts

    def _fitting(self, split: Sequence[Encoded], seq: int, name: str) -> list[Encoded]:
        fitting = [one for one in split if len(one.ids) <= seq + 1]
        if not fitting:
            longest = max(len(one.ids) for one in split)
            raise DataError(
                f"none of the {len(split)} problems of the {name} split fits into {seq} tokens; "
                f"raise train.sequence_length, to {longest - 1} for all of them"
            )
        return fitting


def to_sample(problem: Encoded, seq: int, eos: int, index: int) -> Sample:
    """Return a problem as the sample `index` of `seq` tokens; the targets are its solution's."""
    ids = torch.from_numpy(problem.ids)
    tokens, targets = torch.full((seq,), eos), torch.full((seq,), IGNORE)
    tokens[: len(ids) - 1] = ids[:-1]
    targets[problem.given - 1 : len(ids) - 1] = ids[problem.given :]
    return {"tokens": tokens, "targets": targets, "index": torch.tensor(index)}


def prompts_and_solutions(batch: Sample) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids before the first target, ids of the targets with the end) of each row.

    Raises:
        DataError: a row has no target.
    """
    tokens, targets = batch["tokens"].cpu(), batch["targets"].cpu()
    for row, (ids, wanted) in enumerate(zip(tokens, targets, strict=True)):
        places: Tensor = (wanted != IGNORE).nonzero()[:, 0]
        if not len(places):
            raise DataError(
                f"row {row} of a batch has no target, so there is no problem in it; use "
                "data=problems, which has one in each sequence"
            )
        yield ids[: int(places[0]) + 1].tolist(), wanted[places].tolist()


def prepare(
    data: ProblemsConfig, tokenizer: Any, hashes: Sequence[str] | None = None
) -> ProblemCorpus:
    """Return the corpus.

    Args:
        hashes: the sources' content hashes, frozen with the cell (None: they are not checked).

    Raises:
        DataError: a source has not the frozen hash, a problem cannot be read, or a split is empty.
    """
    problems = split(data, hashes)
    texts = (f"{one.prompt}{one.solution}" for one in problems["train"] if needs_text(tokenizer))
    built = tokenizer.build(texts)
    train, val = ([encode(built, one) for one in some] for some in problems.values())
    return ProblemCorpus(built, train, val)


def split(
    data: ProblemsConfig, hashes: Sequence[str] | None = None
) -> dict[Literal["train", "val"], list[Problem]]:
    """Return the problems of both splits, in their order; for the rest see `prepare`."""
    for source, frozen in zip(data.sources, hashes or (), strict=bool(hashes)):
        refuse_changed(source, frozen)
    splits: dict[Literal["train", "val"], list[Problem]] = {"train": [], "val": []}
    for source in data.sources:
        for problem in source.problems():
            splits["val" if _is_held_out(problem, data.val_fraction) else "train"].append(problem)
    for name, problems in splits.items():
        if not problems:
            names = ", ".join(source_name(source) for source in data.sources)
            raise DataError(f"{names}: the {name} split has no problem; change data.val_fraction")
    return splits


def encode(tokenizer: Any, problem: Problem) -> Encoded:
    """Return the ids of a problem, with the special tokens that begin a text and eos at the end.

    Raises:
        DataError: the prompt has no id.
    """
    before = [int(i) for i in encode_with_special(tokenizer, "") if i != tokenizer.eos]
    prompt, solution = encode_pieces(tokenizer, [problem.prompt, problem.solution])
    if not len(prompt) + len(before):
        raise DataError(f"{problem.where}: the prompt has no token; mend or remove the row")
    ids = np.concatenate([before, prompt, solution, [tokenizer.eos]]).astype(np.int64)
    return Encoded(ids, len(before) + len(prompt))


def _is_held_out(problem: Problem, fraction: float) -> bool:
    digest = hashlib.sha256(problem.prompt.encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32 < fraction
