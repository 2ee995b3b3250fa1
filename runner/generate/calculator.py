"""A calculator inside generation: what follows the "=" of `<12+34=` is given, not chosen."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runner.data.arithmetic import value_of, written

_OPEN = re.compile(r"(<{1,2})([^<>=]*)=$")
_TAIL = 64  # ids: an expression that began earlier is not computed


class Calculator:
    """A constraint of one request: it allows one token only as long as a result is written.

    A call is `<12+34=` or `<<12+34=`, where a token ends with the "="; the result and as many ">"
    as there are "<" are forced. What cannot be computed is left to the model.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._result: list[int] = []
        self._begun = 0

    def __call__(self, ids: Sequence[int]) -> Tensor | None:
        """Return the mask [vocab_size] of the only id that may follow `ids`, None for any."""
        place = len(ids) - self._begun
        if not 0 <= place < len(self._result):
            self._begun, self._result, place = len(ids), self._answer(ids), 0
            if not self._result:
                return None
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[self._result[place]] = True
        return mask

    def _answer(self, ids: Sequence[int]) -> list[int]:
        call = _OPEN.search(self.tokenizer.decode(ids[-_TAIL:])) if ids else None
        if call is None:
            return []
        try:
            value = value_of(call[2])
        except ValueError:
            return []
        text = written(value) + ">" * len(call[1])
        return [int(index) for index in self.tokenizer.encode(text)]
