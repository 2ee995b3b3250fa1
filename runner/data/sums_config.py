"""Sums of numbers, bare or step by step: a small world in which every answer can be checked.

pairs    46+56=102                               text to pre-train on
chains   12+34+56:<12+34=46><46+56=102>#102      problems with a solution written out
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from models.config import config
from runner.data.problems_config import Problem

_LEAST, _MOST = 10, 99  # numbers of two digits
_NUMBERS = _MOST - _LEAST + 1


@config
class SumsConfig:
    """Sums; number i of a kind is a function of (data_seed, i), and no two of a kind are equal.

    Args:
        kind: pairs: a number of up to three digits (itself a sum of two) plus one of two; as
            documents, for data=text. chains: three numbers of two digits, added step by step; for
            data=problems.
        count: how many of them (None: all there are: 17,010 pairs, 729,000 chains).
        data_seed: which ones, and their order.
        weight: share of the training samples, relative to the other sources of data=text.
    """

    kind: Literal["pairs", "chains"] = "chains"
    count: int | None = None
    data_seed: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.count is not None and not 1 <= self.count <= self._size:
            raise ValueError(f"count={self.count} must be in 1 to {self._size}, all {self.kind}")

    def content_hash(self) -> str:
        """Return what identifies the sums."""
        return f"sums-{self.kind}-{self.count}-{self.data_seed}"

    def documents(self) -> Iterator[str]:
        """Yield each sum as a text."""
        if self.kind == "chains":
            yield from (problem.prompt + problem.solution for problem in self.problems())
            return
        for index in self._drawn():
            first, second = divmod(index, _NUMBERS)
            a, b = _LEAST + first, _LEAST + second
            yield f"{a}+{b}={a + b}"

    def problems(self) -> Iterator[Problem]:
        """Yield each chain as a problem.

        Raises:
            ValueError: `kind` is pairs, which have no steps.
        """
        if self.kind != "chains":
            raise ValueError("data.sources.0.kind=pairs has no solutions to learn; use kind=chains")
        for number, index in enumerate(self._drawn(), start=1):
            (first, second), third = divmod(index // _NUMBERS, _NUMBERS), index % _NUMBERS
            a, b, c = (_LEAST + part for part in (first, second, third))
            total = a + b + c
            solution = f"<{a}+{b}={a + b}><{a + b}+{c}={total}>#{total}"
            yield Problem(f"sum {number}", f"{a}+{b}+{c}:", solution)

    @property
    def _size(self) -> int:
        firsts = 2 * _MOST - _LEAST + 1 if self.kind == "pairs" else _NUMBERS**2
        return firsts * _NUMBERS

    def _drawn(self) -> Iterator[int]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.data_seed])))
        yield from rng.permutation(self._size)[: self.count].tolist()
