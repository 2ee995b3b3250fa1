"""The memories of attention: keys and values of all tokens, or of the first and the last ones.

Shape legend: batch, kv = key/value heads, seq = new tokens, ctx = capacity, dim = head width,
slots = window + sinks.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from models.cache import DecoderState, Memory, resized


class KeysValues(Memory):
    """Keys and values of all tokens, [batch, kv, ctx, dim] each; they grow with the text."""

    can_truncate = True

    @classmethod
    def like(
        cls,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
        capacity: int,
    ) -> "KeysValues":
        """Return empty ones for `capacity` tokens such as `k` and `v`, in their dtypes."""
        keys, values = (x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in (k, v))
        return cls(keys=keys, values=values)

    def write(
        self,
        state: DecoderState,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append new keys and values; return all that there are and who sees which (None: all)."""
        self._append(state, {"keys": k, "values": v})
        return self._visible(state, "keys"), self._visible(state, "values"), state.mask

    def _append(self, state: DecoderState, added: Mapping[str, Tensor]) -> None:
        if not state.static:
            self._grow(state.capacity)
        for name, new in added.items():
            if not state.static and state.counts is None and state.first == state.last:
                self[name][:, :, state.last : state.end] = new
            else:
                self._scatter(self[name], state, new.transpose(1, 2))

    def _visible(self, state: DecoderState, name: str) -> Tensor:
        return self[name] if state.static else self[name][:, :, : state.end]

    @staticmethod
    def _scatter(
        tensor: Shaped[Tensor, "batch kv ctx dim"],
        state: DecoderState,
        new: Shaped[Tensor, "batch seq kv dim"],
    ) -> None:
        """Write `new` at the positions of the new tokens.

        What is padding writes what stands or will stand there anyhow: the last real token of its
        row, or in a row without new tokens the old value.
        """
        rows = torch.arange(len(new), device=new.device)[:, None]
        if state.counts is not None:
            idle = (state.counts == 0)[:, None, None, None]
            old = tensor[rows, :, state.positions]
            new = old.where(idle, new[rows, state.sources()])
        tensor[rows, :, state.positions] = new

    def _grow(self, capacity: int) -> None:
        if capacity > self["keys"].shape[2]:
            self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """See `Memory`."""
        for name, tensor in self.tensors.items():
            self[name] = resized(tensor, capacity)

    def of_capacity(self) -> list[Tensor]:
        """See `Memory`."""
        return list(self.tensors.values())

    def empty(self, batch: int, capacity: int) -> Memory:
        """See `Memory`."""
        return self._with(
            {
                name: tensor.new_zeros(batch, tensor.shape[1], capacity, tensor.shape[3])
                for name, tensor in self.tensors.items()
            }
        )

    def put(self, rows: Int64[Tensor, " n"], other: Memory, capacity: int) -> None:
        """See `Memory`."""
        self._grow(capacity)
        width = min(capacity, other["keys"].shape[2])
        for name, tensor in self.tensors.items():
            tensor[rows, :, :width] = other[name][:, :, :width]
            tensor[rows, :, width:] = 0.0  # hidden by the mask; but 0 x NaN is NaN

    def cut(self, row: int, first: int, last: int) -> Memory:
        """See `Memory`."""
        return self._with(
            {n: tensor[row : row + 1, :, first:last].clone() for n, tensor in self.tensors.items()}
        )

    def joined(self, parts: Sequence[Memory]) -> Memory:
        """See `Memory`."""
        return self._with(
            {name: torch.cat([part[name] for part in parts], dim=2) for name in self.tensors}
        )


class LastKeysValues(Memory):
    """Keys and values of the first `sinks` and the last `window` tokens, [batch, kv, slots, dim].

    `positions` [batch, slots] are those of the tokens in the slots, -1 in an empty slot.
    """

    @staticmethod
    def like(
        k: Float[Tensor, "batch kv seq dim"], v: Float[Tensor, "batch kv seq dim"], slots: int
    ) -> "LastKeysValues":
        """Return empty ones such as `k` and `v`, in their dtypes."""
        keys, values = (new.new_zeros(*new.shape[:2], slots, new.shape[3]) for new in (k, v))
        empty = torch.full((len(k), slots), -1, dtype=torch.int64, device=k.device)
        return LastKeysValues({"positions": -1}, keys=keys, values=values, positions=empty)

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
            state.memories[number] = LastKeysValues.like(k, v, slots)
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
        padding, added = state.padding(), state.positions
        if padding is not None:
            added = added.masked_fill(padding, -1)
        positions = torch.cat((self["positions"], added), dim=1)
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
