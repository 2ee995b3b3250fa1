"""A text that is filled in: a prompt, a canvas whose tokens are revealed in any order, a suffix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.canvas import KeptKeysValues
from runner.data.corpus import prompt_ids
from runner.generate.denoising import Denoising
from runner.generate.request import Event, Finish, Request
from runner.generate.reveal import Turn
from runner.generate.text_row import Decode
from runner.generate.text_stream import TextStream


class CanvasRow:
    """A request under way.

    Attributes:
        tokens: ids of prompt, canvas and suffix, `mask` where one is not revealed.
        masked: which tokens of the canvas are not.
        revealed_at: the step that revealed each token of the canvas; -1 before.
        expanded: so often has a masked token become two.
        kept: keys and values of the text at the beginning of the block, where they are cached.
    """

    unread = 0  # a forward pass reads everything

    def __init__(self, request: Request, how: Denoising, mask: int, decode: Decode) -> None:
        self.request, self.how, self.mask = request, how, mask
        size = how.max_new_tokens
        self.begin = len(request.prompt)
        self.tokens = torch.tensor([*request.prompt, *[mask] * size, *how.suffix])
        self.masked = torch.ones(size, dtype=torch.bool)
        self.revealed_at = torch.full((size,), -1)
        self.logprobs = torch.zeros(size)
        self.expanded = 0
        self.kept: KeptKeysValues = {}
        self.stream = TextStream(decode, how.stop, request.prompt)
        self._step, self._begun, self._masked_first, self._given = 0, -1, 0, 0
        self.block = slice(0, 0)

    def turn(self) -> Turn:
        """Return where the text stands; a block that is revealed makes way for the next."""
        first = int(self.masked.nonzero()[0])
        block = self.how.block_of(first) if self.how.block else slice(0, len(self.masked))
        if block != self.block:
            self.block, self._begun = block, self._step
            self._masked_first = int(self.masked[block].sum())
        steps = self.how.steps_of(block)
        return Turn(self._step, self._step - self._begun, steps, self._masked_first)

    def part(self, turn: Turn, *, shift: bool) -> slice:
        """Return the tokens that the step must read; the keys and values of the rest are kept."""
        if self.how.cache == "none" or turn.step == 0:
            return slice(0, len(self.tokens))
        # With the shift the token before the block predicts its first one.
        begin = max(0, self.begin + self.block.start - int(shift))
        end = len(self.tokens) if self.how.cache == "prefix" else self.begin + self.block.stop
        return slice(begin, end)

    def places(self, *, masked: bool = True) -> Tensor:
        """Return the masked places of the block, or the revealed ones, as indices of the canvas."""
        places = (self.masked[self.block] == masked).nonzero()[:, 0]
        return places + self.block.start

    def reveal(self, places: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Put tokens at places of the canvas; the step is over."""
        self.tokens[self.begin + places] = tokens
        self.masked[places] = False
        self.revealed_at[places] = self._step
        self.logprobs[places] = logprobs
        self._step += 1

    def hide(self, places: Tensor) -> None:
        """Mask places of the canvas again."""
        self.tokens[self.begin + places] = self.mask
        self.masked[places] = True
        self.revealed_at[places] = -1

    def expand(self, place: int) -> None:
        """Put two masked tokens in the place of one."""
        self._resize(place, 2)
        self.expanded += 1

    def delete(self, places: Sequence[int]) -> None:
        """Take tokens out of the canvas."""
        for place in sorted(places, reverse=True):  # those before keep their index
            self._resize(place, 0)

    def _resize(self, place: int, size: int) -> None:
        """Put `size` masked tokens in the place of one."""
        at = self.begin + place
        parts = self.tokens[:at], torch.full((size,), self.mask), self.tokens[at + 1 :]
        self.tokens = torch.cat(parts)
        for name, value in {"masked": True, "revealed_at": -1, "logprobs": 0.0}.items():
            old = getattr(self, name)
            new = torch.full((size,), value, dtype=old.dtype)
            setattr(self, name, torch.cat((old[:place], new, old[place + 1 :])))

    def event(self, ends: Sequence[int]) -> Event:
        """Return what can no longer change at the beginning of the canvas."""
        hidden = self.masked.nonzero()[:, 0]
        settled = int(hidden[0]) if len(hidden) else len(self.masked)
        if self.how.remask and len(hidden):
            settled = self.how.block_of(settled).start
        ids: list[int] = []
        text, begun = "", self._given
        finish: Finish = ""
        for token in self.tokens[self.begin + begun : self.begin + settled].tolist():
            if token in ends:
                finish = "stop"
                break
            ids.append(token)
            text += self.stream.push(token)
            if self.stream.stopped:
                finish = "stop"
                break
        self._given += len(ids)
        if not finish and settled == len(self.masked):
            finish = "length"
        given = slice(begun, begun + len(ids))
        return Event(
            id=self.request.id,
            ids=tuple(ids),
            logprobs=tuple(self.logprobs[given].tolist()),
            revealed_at=tuple(self.revealed_at[given].tolist()),
            num_passes=self._step * (2 if self.how.guidance else 1),
            text=text + (self.stream.finish() if finish else ""),
            finish=finish,
        )


def around(
    tokenizer: Any, prefix: str, suffix: str, room: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids before and after a canvas; the suffix ends the document.

    Args:
        room: the most ids in all; what is far from the canvas is cut off (None: any number).
    """
    before = prompt_ids(tokenizer, prefix)
    after = [*(int(index) for index in tokenizer.encode(suffix)), int(tokenizer.eos)]
    if room is None:
        return before, after
    kept = min(len(after), max(room // 2, room - len(before)))
    return before[-(room - kept) :], after[:kept]
