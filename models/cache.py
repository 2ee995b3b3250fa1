"""What a model remembers of the tokens it has read, so that each further token costs one position.

Rows are aligned at the left: row b holds positions 0..lengths[b]-1 and nothing else counts, so prompts
of different lengths share a batch without padding that anyone could see.

Shape legend: batch, kv = key/value heads, seq = new tokens, ctx = capacity, dim = head width, slots = window + sinks.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor


@runtime_checkable
class State(Protocol):
    """The memory of a model: keys and values, recurrent states, whatever its branches keep.

    Args:
        lengths: tokens read, by row [batch].
    """

    lengths: Int64[Tensor, " batch"]

    def select(self, rows: Int64[Tensor, " n"]) -> "State":
        """Return the state of `rows`: some of them, in another order, or one of them several times."""
        ...

    def num_bytes(self) -> int:
        """Return what it holds, in bytes."""
        ...


class Memory:
    """Named tensors of one branch, rows first: a recurrent state, the last inputs of a convolution.

    A branch makes it when it first reads, of the types that it computes in.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def select(self, rows: Int64[Tensor, " n"]) -> "Memory":
        """See `State`."""
        return type(self)(**{name: tensor[rows] for name, tensor in self.tensors.items()})


class DecoderState:
    """What each branch remembers, by its number; all read the same tokens.

    Args:
        batch: rows. capacity: positions to make room for at first.
        static: never grow, and compute with the same shapes at every length, those of the capacity: what a
            compiled step needs. The first call after `start` must not be compiled: it makes the tensors.
    """

    def __init__(
        self, batch: int, *, capacity: int, device: torch.device, static: bool = False
    ) -> None:
        self.static, self.capacity = static, capacity
        self.memories: dict[int, Memory] = {}
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.mask: Bool[Tensor, "batch 1 seq ctx"] | None = None
        self.reading: Int64[Tensor, " batch"] | None = None

    def begin(self, seq: int, counts: Int64[Tensor, " batch"] | None) -> Int64[Tensor, "batch seq"]:
        """Make room for `seq` more tokens a row, of which the first `counts` count; return their positions."""
        self.reading = counts
        self.positions = self.lengths[:, None] + torch.arange(seq, device=self.lengths.device)
        self.mask = None  # each may look at everything
        if self.static:
            ctx = torch.arange(self.capacity, device=self.lengths.device)
            self.mask = (ctx <= self.positions[..., None])[:, None]
            return self.positions
        ends = self.lengths.tolist()
        self.first, self.last = min(ends), max(ends)
        self.end = self.last + seq
        if self.end > self.capacity:
            self.capacity = max(self.end, 2 * self.capacity)
        if seq > 1 or self.first != self.last:
            ctx = torch.arange(self.end, device=self.lengths.device)
            self.mask = (ctx <= self.positions[..., None])[:, None]
        return self.positions

    def unread(self) -> Bool[Tensor, "batch seq"] | None:
        """Return True where a new token is padding, None where none is."""
        if self.reading is None:
            return None
        return self.positions - self.lengths[:, None] >= self.reading[:, None]

    def finish(self) -> Int64[Tensor, " batch"]:
        """Count what was read; return how many tokens of each row that was."""
        read = self.new_tokens()
        self.lengths = self.lengths + read
        return read

    def new_tokens(self) -> Int64[Tensor, " batch"]:
        """Return how many tokens of each row are being read."""
        if self.reading is not None:
            return self.reading
        return torch.full_like(self.lengths, self.positions.shape[1])

    def select(self, rows: Int64[Tensor, " n"]) -> "DecoderState":
        """See `State`."""
        chosen = DecoderState(
            len(rows), capacity=self.capacity, device=rows.device, static=self.static
        )
        chosen.memories = {number: kept.select(rows) for number, kept in self.memories.items()}
        chosen.lengths = self.lengths[rows]
        return chosen

    def num_bytes(self) -> int:
        """See `State`."""
        return sum(t.nbytes for kept in self.memories.values() for t in kept.tensors.values())


def with_history(
    state: DecoderState | None,
    number: int,
    name: str,
    x: Shaped[Tensor, "batch seq *rest"],
    size: int,
    fill: int = 0,
) -> Shaped[Tensor, "batch longer *rest"]:
    """Return `x` behind the last `size` inputs of that name to branch `number` (`fill` where there were none).

    A state then remembers the last `size` of them all, those of each row that count.
    """
    past = x.new_full((x.shape[0], size, *x.shape[2:]), fill)
    if state is None:
        return torch.cat((past, x), dim=1)
    kept = state.memories.setdefault(number, Memory())
    both = torch.cat((kept.tensors.get(name, past), x), dim=1)
    if state.reading is None:
        kept[name] = both[:, both.shape[1] - size :]
    else:
        last = state.reading[:, None] + torch.arange(size, device=x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        kept[name] = both[rows, last]
    return both


class KeysValues(Memory):
    """Keys and values of all tokens, [batch, kv, ctx, dim] each; they grow as they are read into."""

    @staticmethod
    def of(
        state: DecoderState,
        number: int,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> "KeysValues":
        """Return those of branch `number`, at first with room for what is like `k` and `v`."""
        if number not in state.memories:
            keys, values = (x.new_zeros(*x.shape[:2], state.capacity, x.shape[3]) for x in (k, v))
            state.memories[number] = KeysValues(keys=keys, values=values)
        found = state.memories[number]
        assert isinstance(found, KeysValues)
        return found

    def write(
        self,
        state: DecoderState,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind those of each row; return all that any row may look at."""
        for name, new in (("keys", k), ("values", v)):
            missing = state.capacity - self[name].shape[2]
            if missing > 0:
                self[name] = torch.nn.functional.pad(self[name], (0, 0, 0, missing))
            if not state.static and state.first == state.last:
                self[name][:, :, state.last : state.end] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                self[name][rows, :, state.positions] = new.transpose(1, 2)
        if state.static:
            return self["keys"], self["values"]
        return self["keys"][:, :, : state.end], self["values"][:, :, : state.end]


class LastKeysValues(Memory):
    """Keys and values of the first `sinks` tokens and of the last `window`, [batch, kv, slots, dim] each, and the
    position that each slot holds [batch, slots], -1 where it is empty.
    """

    @staticmethod
    def of(
        state: DecoderState,
        number: int,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
        slots: int,
    ) -> "LastKeysValues":
        """Return those of branch `number`, at first with room for what is like `k` and `v`."""
        if number not in state.memories:
            keys, values = (new.new_zeros(*new.shape[:2], slots, new.shape[3]) for new in (k, v))
            held = torch.full((len(k), slots), -1, dtype=torch.int64, device=k.device)
            state.memories[number] = LastKeysValues(keys=keys, values=values, held=held)
        found = state.memories[number]
        assert isinstance(found, LastKeysValues)
        return found

    def write(
        self,
        state: DecoderState,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
        sinks: int,
    ) -> tuple[Tensor, Tensor, Int64[Tensor, "batch all"]]:
        """Return keys and values, old and new, and their positions (-1: none); keep those that a later token needs."""
        old = {name: self[name] for name in ("keys", "values", "held")}
        together = {
            "keys": torch.cat((old["keys"], k), dim=2),
            "values": torch.cat((old["values"], v), dim=2),
        }
        everywhere = torch.cat((old["held"], state.positions), dim=1)
        slots = old["held"].shape[1]
        window, slot = slots - sinks, torch.arange(slots, device=k.device)
        newest = (state.lengths + state.new_tokens() - 1)[:, None]
        # The last position that belongs in each slot: a sink's own, else the window goes round.
        wanted = torch.where(slot < sinks, slot, newest - (newest - slot) % window)
        wanted = torch.where((wanted > newest) | ((slot >= sinks) & (wanted < sinks)), -1, wanted)
        place = torch.where(
            wanted >= state.lengths[:, None], slots + wanted - state.lengths[:, None], slot
        )
        for name, new in together.items():
            index = place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            self[name] = new.gather(2, index)
        self["held"] = wanted
        return together["keys"], together["values"], everywhere
