"""Decoding state: the memory of the tokens read so far, so that a new token costs one position.

Rows are aligned at the left: row b holds positions 0..lengths[b]-1, so prompts of different
lengths share a batch and no token sees padding.

Shape legend: batch, kv = key/value heads, seq = new tokens, ctx = capacity, dim = head width,
slots = window + sinks.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor


@runtime_checkable
class State(Protocol):
    """The decoding state of a model: keys and values, recurrent states.

    Args:
        lengths: number of tokens read in each row.
    """

    lengths: Int64[Tensor, " batch"]

    def select(self, rows: Int64[Tensor, " n"]) -> "State":
        """Return the state of the rows with indices `rows`, in that order; rows may be repeated."""
        ...

    def num_bytes(self) -> int:
        """Return the size of its tensors in bytes."""
        ...


class Memory:
    """The tensors of one branch by name, rows first: a recurrent state, inputs of a convolution.

    A branch makes it on its first forward pass, in the dtype that it computes in.
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
    """The memories of all branches, by number of the branch.

    Args:
        batch: rows.
        capacity: positions to make room for at first.
        static: never grow, and compute with the shapes of the capacity at every length, as a
            compiled step needs. Do not compile the first call after `start`: it makes the tensors.
    """

    def __init__(
        self, batch: int, *, capacity: int, device: torch.device, static: bool = False
    ) -> None:
        self.static, self.capacity = static, capacity
        self.memories: dict[int, Memory] = {}
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.mask: Bool[Tensor, "batch 1 seq ctx"] | None = None
        self.counts: Int64[Tensor, " batch"] | None = None

    def begin(self, seq: int, counts: Int64[Tensor, " batch"] | None) -> Int64[Tensor, "batch seq"]:
        """Make room for `seq` more tokens in each row and return their positions.

        Args:
            counts: `counts[b]` is the number of real tokens of row b, the rest being padding (None:
                all are real).
        """
        self.counts = counts
        self.positions = self.lengths[:, None] + torch.arange(seq, device=self.lengths.device)
        self.mask = None  # a single token per row of equal lengths sees all positions
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

    def padding(self) -> Bool[Tensor, "batch seq"] | None:
        """Return a mask, True where a new token is padding; None if there is no padding."""
        if self.counts is None:
            return None
        return self.positions - self.lengths[:, None] >= self.counts[:, None]

    def finish(self) -> Int64[Tensor, " batch"]:
        """Add the new tokens to `lengths` and return their number in each row."""
        added = self.new_tokens()
        self.lengths = self.lengths + added
        return added

    def new_tokens(self) -> Int64[Tensor, " batch"]:
        """Return the number of real tokens of each row in this forward pass."""
        if self.counts is not None:
            return self.counts
        return torch.full_like(self.lengths, self.positions.shape[1])

    def select(self, rows: Int64[Tensor, " n"]) -> "DecoderState":
        """See `State`."""
        chosen = DecoderState(
            len(rows), capacity=self.capacity, device=rows.device, static=self.static
        )
        chosen.memories = {n: memory.select(rows) for n, memory in self.memories.items()}
        chosen.lengths = self.lengths[rows]
        return chosen

    def num_bytes(self) -> int:
        """See `State`."""
        return sum(t.nbytes for memory in self.memories.values() for t in memory.tensors.values())


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
    both = torch.cat((memory.tensors.get(name, past), x), dim=1)
    if state.counts is None:
        memory[name] = both[:, both.shape[1] - size :]
    else:
        last = state.counts[:, None] + torch.arange(size, device=x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        memory[name] = both[rows, last]
    return both


class KeysValues(Memory):
    """Keys and values of all tokens, [batch, kv, ctx, dim] each; they grow with the text."""

    @staticmethod
    def of(
        state: DecoderState,
        number: int,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> "KeysValues":
        """Return those of branch `number`; the first call makes them, in the dtype of `k`, `v`."""
        if number not in state.memories:
            keys, values = (x.new_zeros(*x.shape[:2], state.capacity, x.shape[3]) for x in (k, v))
            state.memories[number] = KeysValues(keys=keys, values=values)
        memory = state.memories[number]
        assert isinstance(memory, KeysValues)
        return memory

    def write(
        self,
        state: DecoderState,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values to each row; return all that a row may attend to."""
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
    """Keys and values of the first `sinks` and the last `window` tokens, [batch, kv, slots, dim].

    `positions` [batch, slots] are those of the tokens in the slots, -1 in an empty slot.
    """

    @staticmethod
    def of(
        state: DecoderState,
        number: int,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
        slots: int,
    ) -> "LastKeysValues":
        """Return those of branch `number`; the first call makes them, in the dtype of `k`, `v`."""
        if number not in state.memories:
            keys, values = (new.new_zeros(*new.shape[:2], slots, new.shape[3]) for new in (k, v))
            empty = torch.full((len(k), slots), -1, dtype=torch.int64, device=k.device)
            state.memories[number] = LastKeysValues(keys=keys, values=values, positions=empty)
        memory = state.memories[number]
        assert isinstance(memory, LastKeysValues)
        return memory

    def write(
        self,
        state: DecoderState,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
        sinks: int,
    ) -> tuple[Tensor, Tensor, Int64[Tensor, "batch all"]]:
        """Return keys, values and positions, old and new; keep those that later tokens attend to.

        A position is -1 where there is no token.
        """
        together = {
            "keys": torch.cat((self["keys"], k), dim=2),
            "values": torch.cat((self["values"], v), dim=2),
        }
        positions = torch.cat((self["positions"], state.positions), dim=1)
        slots = self["positions"].shape[1]
        window, slot = slots - sinks, torch.arange(slots, device=k.device)
        newest = (state.lengths + state.new_tokens() - 1)[:, None]
        # The last position that belongs in each slot: a sink's own, else the window's, cyclic.
        wanted = torch.where(slot < sinks, slot, newest - (newest - slot) % window)
        wanted = torch.where((wanted > newest) | ((slot >= sinks) & (wanted < sinks)), -1, wanted)
        is_new = wanted >= state.lengths[:, None]
        source = torch.where(is_new, slots + wanted - state.lengths[:, None], slot)
        for name, tensor in together.items():
            index = source[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
            self[name] = tensor.gather(2, index)
        self["positions"] = wanted
        return together["keys"], together["values"], positions
