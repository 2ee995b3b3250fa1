"""What a model remembers of the tokens it has read, so that each further token costs one position.

Rows are aligned at the left: row b holds positions 0..lengths[b]-1 and nothing else counts, so prompts
of different lengths share a batch without padding that anyone could see.

Shape legend: batch, kv = key/value heads, seq = new tokens, ctx = capacity, dim = head width.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@runtime_checkable
class State(Protocol):
    """The memory of a model: keys and values here, a recurrent state elsewhere.

    Args:
        lengths: tokens read, by row [batch].
    """

    lengths: Int64[Tensor, " batch"]

    def select(self, rows: Int64[Tensor, " n"]) -> "State":
        """Return the state of `rows`: some of them, in another order, or one of them several times."""
        ...


class KVCache:
    """Keys and values of every layer, [batch, kv, ctx, dim] each; it grows as it is read into.

    A layer's tensors are made when it first writes, of the shape and type of what it writes: under
    a precision recipe that may be another type than the parameters'.

    Args:
        batch: rows. capacity: positions to make room for at first.
        static: never grow, and compute with the same shapes at every length, those of the capacity: what a
            compiled step needs. The first call after `start` must not be compiled: it makes the tensors.
    """

    def __init__(
        self, batch: int, *, capacity: int, device: torch.device, static: bool = False
    ) -> None:
        self.static = static
        self.mask: Bool[Tensor, "batch 1 seq ctx"] | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    def begin(self, seq: int) -> Int64[Tensor, "batch seq"]:
        """Make room for `seq` more tokens a row; return their positions."""
        if self.static:
            self._positions = self.lengths[:, None] + torch.arange(seq, device=self.lengths.device)
            ctx = torch.arange(self.capacity, device=self.lengths.device)
            self.mask = (ctx <= self._positions[..., None])[:, None]
            return self._positions
        ends = self.lengths.tolist()
        self._first, self._last, self._seq = min(ends), max(ends), seq
        self._reserve(self._last + seq)
        self._positions = self.lengths[:, None] + torch.arange(seq, device=self.lengths.device)
        self.mask = None  # each may look at everything
        if seq > 1 or self._first != self._last:
            ctx = torch.arange(self._last + seq, device=self.lengths.device)
            self.mask = (ctx <= self._positions[..., None])[:, None]
        return self._positions

    def write(
        self, layer: int, k: Float[Tensor, "batch kv seq dim"], v: Float[Tensor, "batch kv seq dim"]
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind those of each row; return all that any row may look at."""
        if layer == len(self.keys):
            for tensors, new in ((self.keys, k), (self.values, v)):
                tensors.append(new.new_zeros(*new.shape[:2], self.capacity, new.shape[3]))
        if self.static:
            rows = torch.arange(len(k), device=k.device)[:, None]
            for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
                kept[rows, :, self._positions] = new.transpose(1, 2)
            return self.keys[layer], self.values[layer]
        end = self._last + self._seq
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self._first == self._last:
                kept[:, :, self._last : end] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                kept[rows, :, self._positions] = new.transpose(1, 2)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def end(self, counts: Int64[Tensor, " batch"] | None) -> Int64[Tensor, " batch"]:
        """Count what was read, the first `counts` tokens of each row (None: all); return the counts."""
        read = torch.full_like(self.lengths, self._positions.shape[1]) if counts is None else counts
        self.lengths = self.lengths + read
        return read

    def _reserve(self, positions: int) -> None:
        """Make room for `positions`, twice what there was at least."""
        if positions <= self.capacity:
            return
        more = max(positions, 2 * self.capacity) - self.capacity
        self.capacity += more
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                tensors[index] = torch.nn.functional.pad(old, (0, 0, 0, more))

    def select(self, rows: Int64[Tensor, " n"]) -> "KVCache":
        """See `State`."""
        chosen = object.__new__(KVCache)
        chosen.keys = [tensor[rows] for tensor in self.keys]
        chosen.values = [tensor[rows] for tensor in self.values]
        chosen.capacity, chosen.static = self.capacity, self.static
        chosen.lengths = self.lengths[rows]
        return chosen
