"""Decoding state: the memory of the tokens read so far, so that a new token costs one position.

Rows are aligned at the left: row b holds positions 0..lengths[b]-1, so prompts of different
lengths share a batch and no token sees padding.

Shape legend: batch, seq = new tokens, ctx = capacity.
"""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from models.attention_config import Stored


@runtime_checkable
class State(Protocol):
    """The decoding state of a model: keys and values, recurrent states.

    A forward pass with `counts[b] = 0` changes no bit of row b.

    Args:
        lengths: number of tokens read in each row.
    """

    lengths: Int64[Tensor, " batch"]

    @property
    def can_truncate(self) -> bool:
        """Whether `truncate` can forget tokens; if not, keep a `select` of the row from before."""
        ...

    def select(self, rows: Int64[Tensor, " n"]) -> "State":
        """Return a copy of the rows with indices `rows`, in that order; rows may be repeated.

        The other rows are not in it: their memory is free once this state is.
        """
        ...

    def put(self, rows: Int64[Tensor, " n"], other: Any) -> None:
        """Replace row rows[i] of this state by row i of `other`, in place, for every i.

        The capacities may differ; this state grows if it must. `other` stays as it is.

        Raises:
            ValueError: `rows` are not as many as those of `other`, or this state is static and has
                no room for them.
        """
        ...

    def truncate(self, lengths: Int64[Tensor, " batch"]) -> None:
        """Forget the tokens of each row b from position lengths[b] on, in place.

        Raises:
            ValueError: a row has read fewer tokens than that, or one must forget tokens and the
                state cannot (`can_truncate`).
        """
        ...

    def to(self, device: torch.device) -> "State":
        """Return a copy on `device`."""
        ...

    def num_bytes(self) -> int:
        """Return the size in bytes of what it remembers of the tokens; 0 if it has no rows."""
        ...


class Memory:
    """The tensors of one branch by name, rows first: a recurrent state, inputs of a convolution.

    A branch makes it on its first forward pass, in the dtype that it computes in.

    Args:
        fills: by name of a tensor, the value of its elements before the first token (default 0).
    """

    can_truncate = False  # what earlier tokens left is overwritten

    def __init__(self, fills: Mapping[str, int] | None = None, **tensors: Tensor) -> None:
        self.fills, self.tensors = dict(fills or {}), tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def select(self, rows: Int64[Tensor, " n"]) -> "Memory":
        """See `State`."""
        return self._with({name: tensor[rows] for name, tensor in self.tensors.items()})

    def empty(self, batch: int, capacity: int) -> "Memory":
        """Return the memory of `batch` rows before their first token, of the same dtypes.

        Args:
            capacity: positions to make room for, where a memory has a place for each.
        """
        return self._with(
            {
                name: tensor.new_full((batch, *tensor.shape[1:]), self.fills.get(name, 0))
                for name, tensor in self.tensors.items()
            }
        )

    def put(self, rows: Int64[Tensor, " n"], other: "Memory", capacity: int) -> None:
        """See `State`; `capacity` is that of the state, which suffices for `other`."""
        for name, tensor in self.tensors.items():
            tensor[rows] = other[name]

    def cut(self, row: int, first: int, last: int) -> "Memory":
        """Return a copy of what tokens first..last-1 of a row left: the whole row, if at `last`."""
        return self.select(torch.tensor([row], device=next(iter(self.tensors.values())).device))

    def joined(self, parts: Sequence["Memory"]) -> "Memory":
        """Return the memory of one row that read the tokens of all `parts` of `cut` in turn."""
        return parts[-1]

    def of_capacity(self) -> list[Tensor]:
        """Return the tensors whose size in dim 2 hangs on the capacity: places of positions."""
        return []

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` tokens, where a memory has a place for each, in place."""

    def to(self, device: torch.device) -> "Memory":
        """See `State`."""
        return self._with({name: t.to(device, copy=True) for name, t in self.tensors.items()})

    def num_bytes(self) -> int:
        """See `State`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _with(self, tensors: Mapping[str, Tensor]) -> "Memory":
        return type(self)(self.fills, **tensors)


class DecoderState:
    """The memories of all branches, by number of the branch.

    Args:
        batch: rows.
        capacity: positions to make room for at first.
        static: never grow, and compute with the shapes of the capacity at every length, as a
            compiled step needs. The first call after `start`, or the first `put`, makes the
            tensors: do not compile that call.
        stored: keep keys and values of all tokens in this format (None: as they are computed).

    Attributes:
        row_by_row: branches are to attend in each row apart, over the positions that it has: then
            neither other rows nor the capacity change a bit of it. A mask alone does not do it: the
            number of positions, hidden or not, decides in which order kernels sum. For static
            states, not in compiled code.
    """

    row_by_row = False

    def __init__(
        self,
        batch: int,
        *,
        capacity: int,
        device: torch.device,
        static: bool = False,
        stored: Stored | None = None,
    ) -> None:
        self.static, self.capacity, self.stored = static, capacity, stored
        # A tensor: compiled code would take the number for a constant.
        self.places = torch.arange(capacity, device=device) if static else None
        self.memories: dict[int, Memory] = {}
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.mask: Bool[Tensor, "batch 1 seq ctx"] | None = None
        self.counts: Int64[Tensor, " batch"] | None = None
        self._marked: list[Tensor] | None = None  # by `compile_for_any_capacity`

    def begin(
        self,
        seq: int,
        counts: Int64[Tensor, " batch"] | None,
        reach: Int64[Tensor, "batch seq"] | None = None,
    ) -> Int64[Tensor, "batch seq"]:
        """Make room for `seq` more tokens in each row and return their positions.

        Padding has the position of the last real token of its row, so that none is beyond the end.

        Args:
            counts: `counts[b]` is the number of real tokens of row b, the rest being padding (None:
                all are real).
            reach: the index of the last new token that each sees (None: itself).

        Raises:
            ValueError: the state is static and has no room for the tokens of a row.
        """
        self.offsets = torch.arange(seq, device=self.lengths.device)
        self.counts = counts if self.static else self._make_room(seq, counts)
        if self.static and not torch.compiler.is_compiling():
            self._check_room(self.lengths + (seq if counts is None else counts))
        self.positions = self.lengths[:, None] + self.sources()
        if self.counts is not None:
            self.positions = self.positions.where(self.counts[:, None] > 0, self.positions - 1)
            self.positions = self.positions.clamp(min=0)
        # The last position that each new token sees.
        self.seen = self.positions if reach is None else self.positions + reach - self.offsets
        self.mask = None  # a single token per row of equal lengths sees all positions
        if self.static or seq > 1 or self.counts is not None or self.first != self.last:
            ctx = self.places
            if ctx is None:
                ctx = torch.arange(self.end, device=self.lengths.device)
            self.mask = (ctx <= self.seen[..., None])[:, None]
        return self.positions

    def _make_room(
        self, seq: int, counts: Int64[Tensor, " batch"] | None
    ) -> Int64[Tensor, " batch"] | None:
        """Grow to `seq` or `counts` more tokens; return `counts`, None if no token is padding."""
        added = torch.full_like(self.lengths, seq) if counts is None else counts
        before, after = torch.stack((self.lengths, self.lengths + added)).tolist()
        self.first, self.last, self.end = min(before), max(before), max(1, *after)
        if self.end > self.capacity:
            self.capacity = max(self.end, 2 * self.capacity)
        all_real = all(b - a == seq for a, b in zip(before, after, strict=True))
        return None if all_real else counts

    def _check_room(self, lengths: Int64[Tensor, " batch"]) -> None:
        longest = max(lengths.tolist(), default=0)
        if longest > self.capacity:
            raise ValueError(
                f"a row of {longest} tokens does not fit a static state of {self.capacity}; start "
                "one with a larger capacity"
            )

    def sources(self) -> Int64[Tensor, "#batch seq"]:
        """Return the index of the new token that belongs at each of `positions`.

        It is its own, for padding that of the last real token of its row (0 if there is none).
        """
        if self.counts is None:
            return self.offsets[None]
        return torch.minimum(self.offsets, self.counts[:, None] - 1).clamp(min=0)

    def padding(self) -> Bool[Tensor, "batch seq"] | None:
        """Return a mask, True where a new token is padding; None if there is no padding."""
        return None if self.counts is None else self.offsets >= self.counts[:, None]

    def finish(self) -> Int64[Tensor, " batch"]:
        """Add the new tokens to `lengths` and return their number in each row."""
        added = self.new_tokens()
        self.lengths = self.lengths + added
        self.mask = None
        return added

    def new_tokens(self) -> Int64[Tensor, " batch"]:
        """Return the number of real tokens of each row in this forward pass."""
        if self.counts is not None:
            return self.counts
        return torch.full_like(self.lengths, len(self.offsets))

    @property
    def can_truncate(self) -> bool:
        """See `State`."""
        return all(memory.can_truncate for memory in self.memories.values())

    def select(self, rows: Int64[Tensor, " n"]) -> "DecoderState":
        """See `State`."""
        return self._with(
            {n: memory.select(rows) for n, memory in self.memories.items()}, self.lengths[rows]
        )

    def put(self, rows: Int64[Tensor, " n"], other: "DecoderState") -> None:
        """See `State`."""
        if len(rows) != len(other.lengths):
            raise ValueError(
                f"{len(rows)} rows cannot be replaced by {len(other.lengths)}; give one for each"
            )
        if self.static:
            self._check_room(other.lengths)
        else:
            self.capacity = max([self.capacity, *other.lengths.tolist()])
        for number, memory in other.memories.items():
            if number not in self.memories:
                self.memories[number] = memory.empty(len(self.lengths), self.capacity)
        for number, memory in self.memories.items():
            new = other.memories.get(number)
            if new is None:  # `other` has read nothing
                new = memory.empty(len(rows), self.capacity)
            memory.put(rows, new, self.capacity)
        self.lengths = self.lengths.index_copy(0, rows, other.lengths)

    def truncate(self, lengths: Int64[Tensor, " batch"]) -> None:
        """See `State`."""
        for row, (now, wanted) in enumerate(
            zip(self.lengths.tolist(), lengths.tolist(), strict=True)
        ):
            if not 0 <= wanted <= now:
                raise ValueError(f"row {row} has {now} tokens; {wanted} of them cannot be kept")
            if wanted < now and not self.can_truncate:
                raise ValueError(
                    f"row {row} cannot go back from {now} tokens to {wanted}: its state is not a "
                    "list of tokens; keep a `select` of the row from before"
                )
        self.lengths = lengths.clone()

    def unread(self, batch: int, capacity: int) -> "DecoderState":
        """Return a state of `batch` rows before their first token, whose tensors are made."""
        memories = {n: memory.empty(batch, capacity) for n, memory in self.memories.items()}
        return self._with(memories, self.lengths.new_zeros(batch), capacity)

    def resize(self, capacity: int) -> None:
        """Give this static state another capacity, in place; longer rows lose their ends."""
        self.capacity = capacity
        self.lengths = self.lengths.clamp(max=capacity)
        self.places = torch.arange(capacity, device=self.lengths.device)
        for memory in self.memories.values():
            memory.resize(capacity)

    def compile_for_any_capacity(self) -> None:
        """Let what is compiled for this state take others of any capacity: one graph for all.

        It is static, and its tensors are made.
        """
        tensors = [tensor for memory in self.memories.values() for tensor in memory.of_capacity()]
        old = self._marked
        if old is not None and len(tensors) == len(old) and all(map(is_, tensors, old)):
            return  # marking takes longer than looking
        torch._dynamo.maybe_mark_dynamic(self.places, 0)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        self._marked = tensors

    def to(self, device: torch.device) -> "DecoderState":
        """See `State`."""
        memories = {n: memory.to(device) for n, memory in self.memories.items()}
        return self._with(memories, self.lengths.to(device, copy=True))

    def num_bytes(self) -> int:
        """See `State`."""
        return sum(memory.num_bytes() for memory in self.memories.values())

    def _with(
        self, memories: dict[int, Memory], lengths: Tensor, capacity: int | None = None
    ) -> "DecoderState":
        made = DecoderState(
            len(lengths),
            capacity=self.capacity if capacity is None else capacity,
            device=lengths.device,
            static=self.static,
            stored=self.stored,
        )
        made.memories, made.lengths, made.row_by_row = memories, lengths, self.row_by_row
        return made


def resized(
    tensor: Shaped[Tensor, "batch kv ctx dim"], size: int
) -> Shaped[Tensor, "batch kv size dim"]:
    """Return `tensor` with `size` places in dim 2: the first ones, and zeros behind them."""
    made = tensor.new_empty(*tensor.shape[:2], size, tensor.shape[3])
    kept = min(size, tensor.shape[2])
    made[:, :, :kept] = tensor[:, :, :kept]
    made[:, :, kept:] = 0
    return made


def with_history(
    state: DecoderState | None,
    number: int,
    name: str,
    x: Shaped[Tensor, "batch seq *rest"],
    size: int,
    fill: int = 0,
) -> Shaped[Tensor, "batch longer *rest"]:
    """Return `x` with the `size` inputs before it in front, `fill` before the first token.

    `state`, if given, remembers the last `size` real inputs of each row under (`number`, `name`).
    """
    past = x.new_full((x.shape[0], size, *x.shape[2:]), fill)
    if state is None:
        return torch.cat((past, x), dim=1)
    memory = state.memories.setdefault(number, Memory())
    memory.fills[name] = fill
    both = torch.cat((memory.tensors.get(name, past), x), dim=1)
    if state.counts is None:
        memory[name] = both[:, both.shape[1] - size :].clone()  # a view would keep all of `both`
    else:
        last = state.counts[:, None] + torch.arange(size, device=x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        memory[name] = both[rows, last]
    return both
