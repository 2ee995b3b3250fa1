"""The texts that a model decodes together, a row of its state for each.

Shape legend: batch, seq, vocab.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.at_least_fp32 import at_least_fp32
from models.cache import DecoderState, State
from models.contract import Pass, read, read_side_by_side, start
from models.text_state import TextState
from runner.generate.compiled_step import CompiledStep
from runner.generate.scoring import padded

_LEAST_CAPACITY = 64
_LEAST_PIECE = 2  # of a compiled pass: a size of 1 would be a graph of its own


def prefill(
    model: Any,
    texts: Sequence[Sequence[int]],
    state: State | None = None,
    *,
    capacity: int | None = None,
    static: bool = False,
    every: bool = False,
    spans: Sequence[int] | None = None,
) -> tuple[Tensor, State]:
    """Read texts of one length; return the logits after each and the state to go on from.

    Args:
        texts: ids of each row.
        state: that they continue (None: they begin).
        capacity: tokens to make room for in a new state (None: twice the length).
        static: give a new state a shape that never changes.
        every: return the logits after every token.
        spans: ids of spans whose tokens see each other, 0 elsewhere, the same in each row.

    Returns:
        Logits, [batch, vocab] or [batch, seq, vocab], in fp32 at least, and the state.
    """
    tokens = torch.tensor(texts, device=next(model.parameters()).device)
    if state is None:
        room = 2 * tokens.shape[1] if capacity is None else capacity
        state = start(model, len(tokens), room, static=static)
    given = None
    if spans is not None:
        given = torch.tensor([list(spans)], device=tokens.device).expand(tokens.shape)
    return at_least_fp32(read(model, tokens, state, every=every, spans=given)), state


class DecodingBatch:
    """Texts by name, each with its place in the batch; a place left free is kept or given up.

    Args:
        context: the most tokens of a text.
        fixed_rows: keep a batch of so many rows whatever runs, for a compiled step and for numbers
            that do not depend on the company. Its state has room for the longest text: 64, 96, 128,
            192, ... tokens, `context` at most. None: as many rows as there are texts,
            as long as they.
        compiled: compile the step, once for all capacities, and the step that reads a piece of a
            prompt too.
        invariant: no bit of a text may depend on the others. A step that is not compiled then
            attends row by row, on a CPU; else the state always has room for `context` tokens, since
            the longest text would decide in which order the sums of the others are taken.
    """

    def __init__(
        self,
        model: Any,
        context: int,
        fixed_rows: int | None = None,
        *,
        compiled: bool = False,
        invariant: bool = False,
    ) -> None:
        self.model, self.context, self.fixed_rows = model, context, fixed_rows
        self.compiled, self.invariant = compiled, invariant
        self._step: Any = CompiledStep(model) if compiled else model
        self._together = (
            self._step.read_side_by_side if compiled else partial(read_side_by_side, model)
        )
        self.device = next(model.parameters()).device
        self._names: list[str | None] = []  # of each row, None where it is free
        self._state: State | None = None
        self._capacity = 0  # of a state of fixed shape
        self._marked: Tensor | None = None  # lengths
        self._before: State | None = None  # what `read_ahead` has read, of a state that overwrites
        self._ahead: dict[str, Sequence[int]] = {}

    @cached_property
    def keeps_every_length(self) -> bool:
        """Whether a state holds what it was after any of its tokens: nothing is overwritten."""
        _, state = prefill(self.model, [[0]])
        return state.can_truncate

    def join(self, names: Sequence[str], state: State) -> None:
        """Add texts that have been read; `state` becomes the batch's own."""
        if not self._names and self.fixed_rows is None:
            self._names, self._state = list(names), state
            return
        free = [i for i, name in enumerate(self._names) if name is None]
        if len(free) < len(names):
            free += self._widen(max(len(self._names) + len(names) - len(free), 1))
        if self.fixed_rows is not None:
            self._fit([*self._lengths().values(), *state.lengths.tolist()])
        places = free[: len(names)]
        assert self._state is not None
        self._state.put(torch.tensor(places, device=self.device), state)
        for place, name in zip(places, names, strict=True):
            self._names[place] = name

    def leave(self, name: str) -> None:
        """Free the row of a text; one that is not in the batch is left alone."""
        if name in self._names:
            self._names[self._names.index(name)] = None
        if not any(other is not None for other in self._names):
            self._names, self._state = [], None

    def take(self, name: str) -> State:
        """Return the state of a text, [1 row], which leaves the batch; it can grow."""
        assert self._state is not None
        place = self._names.index(name)
        state = self._state.select(torch.tensor([place], device=self.device))
        if self.fixed_rows is not None:
            growing = start(self.model, 1, int(state.lengths))
            growing.put(torch.tensor([0], device=self.device), state)
            state = growing
        self.leave(name)
        return state

    def place(self, name: str) -> tuple[State, int] | None:
        """Return (the batch's state, the row of a text in it), None if it is not in the batch."""
        if self._state is None or name not in self._names:
            return None
        return self._state, self._names.index(name)

    def step(self, newest: Mapping[str, int], keep: int) -> Float[Tensor, "batch vocab"]:
        """Read one token of each named text; return the logits after them, in this order.

        The other texts stay as they are.

        Args:
            keep: the most free rows that stay in the batch, for texts that are about to join.
        """
        return self._in_order(newest, self._read(*self._newest(newest, keep)))

    def step_beside(
        self, newest: Mapping[str, int], keep: int, ids: Sequence[int], beside: State
    ) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "1 vocab"]]:
        """Take a `step`, and in the same pass read `ids` into a state of one row beside it.

        Return the logits of both.
        """
        tokens, counts = torch.tensor([ids], device=self.device), None
        batch = self._newest(newest, keep)
        if self.compiled:
            counts = torch.tensor([len(ids)], device=self.device)
            tokens = F.pad(tokens, (0, max(0, _LEAST_PIECE - len(ids))))
            torch._dynamo.maybe_mark_dynamic(tokens, 1)
            for state in (batch[1], beside):
                assert isinstance(state, DecoderState)
                state.compile_for_any_capacity()
        logits, others = self._together([batch, (tokens, beside, counts)])
        return self._in_order(newest, logits), at_least_fp32(others)

    def state_beside(self, capacity: int, state: State | None = None) -> State:
        """Return a state of one row for `step_beside`: `state`, or one that has read nothing.

        A compiled step takes one of fixed shape, so it may be a copy. The batch has texts.
        """
        if not self.compiled:
            return start(self.model, 1, capacity) if state is None else state
        assert state is None or isinstance(state, DecoderState)
        if state is not None and state.static:
            return state
        assert isinstance(self._state, DecoderState)
        fitted = self._state.unread(1, self._capacity_for(capacity))
        if state is not None:
            fitted.put(torch.tensor([0], device=self.device), state)
        return fitted

    def _newest(self, newest: Mapping[str, int], keep: int) -> Pass:
        """Return the newest token of each row of the batch, its state, which tokens count."""
        self._make_room(dict.fromkeys(newest, 1), keep)
        assert self._state is not None
        unread_id = 0  # of free and idle rows, whose count is 0
        ids = [unread_id if name is None else newest.get(name, unread_id) for name in self._names]
        tokens = torch.tensor(ids, device=self.device)[:, None]
        counts = None
        varies = self.fixed_rows is not None and self.fixed_rows > 1  # one graph for all counts
        if varies or len(newest) < len(self._names):
            unread = [int(name in newest) for name in self._names]
            counts = torch.tensor(unread, device=self.device)
        return tokens, self._state, counts

    def _in_order(self, newest: Mapping[str, int], logits: Tensor) -> Tensor:
        logits = at_least_fp32(logits)
        return logits if list(newest) == self._names else logits[self._places(newest)]

    def read_ahead(
        self, ids: Mapping[str, Sequence[int]], keep: int, *, width: int | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Read several tokens of each named text; return the logits after each, in this order.

        `go_back` then says how many of them count.

        Args:
            keep: see `step`.
            width: compute in pieces of so many tokens (None: of the longest).
        """
        self._make_room({name: len(own) for name, own in ids.items()}, keep)
        state = self._state
        assert state is not None
        rows = torch.arange(len(self._names), device=self.device)
        self._before = None if state.can_truncate else state.select(rows)
        self._ahead = dict(ids)
        texts = [ids.get(name, ()) if name is not None else () for name in self._names]
        tokens, counts = padded(texts, self.device)
        if width is not None:
            tokens = F.pad(tokens, (0, width - tokens.shape[1]))
        logits = self._read(tokens, state, counts, every=True)
        return at_least_fp32(logits)[self._places(ids)]

    def go_back(self, counts: Mapping[str, int]) -> None:
        """Forget of what `read_ahead` has read all but the first `counts` tokens of each text."""
        state, read_ids = self._state, self._ahead
        assert state is not None
        if all(counts[name] == len(ids) for name, ids in read_ids.items()):
            return
        if self._before is None:
            lost = [
                len(read_ids[n]) - counts[n] if n is not None and n in read_ids else 0
                for n in self._names
            ]
            state.truncate(state.lengths - torch.tensor(lost, device=self.device))
            return
        self._state, self._before = self._before, None  # there is no other way back: read again
        kept = {name: ids[: counts[name]] for name, ids in read_ids.items()}
        texts = [kept.get(name, ()) if name is not None else () for name in self._names]
        tokens, numbers = padded(texts, self.device)
        if tokens.shape[1]:
            read(self.model, tokens, self._state, counts=numbers)

    def mark(self) -> None:
        """Remember the state as it is, for `back_to_mark`."""
        assert self._state is not None
        rows = torch.arange(len(self._names), device=self.device)
        self._marked = self._state.lengths.clone()
        self._before = None if self._state.can_truncate else self._state.select(rows)

    def back_to_mark(self) -> None:
        """Forget what was read since `mark`; no text has joined or left meanwhile."""
        if self._state is None or self._marked is None:
            return
        if self._before is None:
            self._state.truncate(self._marked)
        else:
            self._state = self._before
        self._before = self._marked = None

    def _places(self, names: Iterable[str]) -> Tensor:
        places = {name: place for place, name in enumerate(self._names)}
        return torch.tensor([places[name] for name in names], device=self.device)

    def num_bytes(self) -> int:
        """Return the size of the state."""
        return 0 if self._state is None else self._state.num_bytes()

    def _read(
        self, tokens: Tensor, state: State, counts: Tensor | None, *, every: bool = False
    ) -> Tensor:
        if self.compiled and isinstance(state, DecoderState | TextState):
            state.compile_for_any_capacity()
        return read(self._step, tokens, state, counts=counts, every=every)

    def _widen(self, rows: int) -> list[int]:
        """Make room for `rows` rows; return the new ones."""
        old, before = self._state, len(self._names)
        if self.fixed_rows is not None:
            assert rows <= self.fixed_rows, f"{rows} rows in a batch of {self.fixed_rows}"
            rows = self.fixed_rows  # `_fit` makes their state
        else:
            self._state = start(self.model, rows, 1)
            if old is not None:
                self._state.put(torch.arange(before, device=self.device), old)
        self._names += [None] * (rows - before)
        return list(range(before, rows))

    def _make_room(self, added: Mapping[str, int], keep: int) -> None:
        """Make room for so many more tokens of texts of the batch; see `step` for `keep`."""
        if self.fixed_rows is None:
            self._give_up(keep)
        else:
            self._fit([n + added.get(name, 0) for name, n in self._lengths().items()])

    def _lengths(self) -> dict[str, int]:
        """Return how many tokens of each text are read."""
        if self._state is None:
            return {}
        lengths = zip(self._names, self._state.lengths.tolist(), strict=True)
        return {name: length for name, length in lengths if name is not None}

    def _fit(self, lengths: Iterable[int]) -> None:
        """Give a state of fixed shape the capacity for texts of these lengths, all that run."""
        assert self.fixed_rows is not None
        longest, old = max(lengths), self._state
        varies = self._apart or not self.invariant
        capacity = self._capacity_for(longest) if varies else self.context
        # Rather too large for a while than copied whenever a long text gives way to a short one.
        if old is not None and capacity <= self._capacity < 2 * capacity:
            return
        self._capacity = capacity
        if isinstance(old, DecoderState):
            old.resize(capacity)
            return
        state = start(self.model, self.fixed_rows, capacity, static=True)
        if isinstance(state, DecoderState):
            state.row_by_row = self._apart
        if old is not None:
            live = [place for place, name in enumerate(self._names) if name is not None]
            rows = torch.tensor(live, device=self.device)
            state.put(rows, old.select(rows))
        self._state = state

    def _capacity_for(self, length: int) -> int:
        """Return the room of a state of fixed shape that holds a text of so many tokens."""
        capacity = _LEAST_CAPACITY
        while capacity < length:
            odd = capacity % 3 == 0
            capacity = capacity // 3 * 4 if odd else capacity // 2 * 3
        return min(capacity, self.context)

    @cached_property
    def _apart(self) -> bool:
        """Whether rows are attended to apart, so that no capacity changes their bits."""
        can = self.invariant and not self.compiled and self.device.type == "cpu"
        return can and isinstance(start(self.model, 1, 1), DecoderState)

    def _give_up(self, keep: int) -> None:
        """Drop free rows beyond `keep`."""
        free = [i for i, name in enumerate(self._names) if name is None]
        if len(free) <= keep:
            return
        dropped = set(free[keep:])
        left = [i for i in range(len(self._names)) if i not in dropped]
        assert self._state is not None
        self._state = self._state.select(torch.tensor(left, device=self.device))
        self._names = [self._names[i] for i in left]
