"""Keys and values of attention in few bits: each token by itself, or keys by channel.

    int8, fp8   a scale in bf16 for each token and head
    nvfp4       the same, and blocks of 16 channels with E4M3 scales
    int4, int2  KIVI (arXiv 2402.02750): keys in groups of 32 tokens, a span for each channel, since
                a few channels of keys are large in all tokens; values token by token in groups of
                32 channels; the newest 32 to 63 tokens as they were computed

They are read as numbers again in every step: memory is what this saves. What a token sees depends
neither on the passes in which its text was read nor on other rows.

Shape legend: batch, kv = key/value heads, seq = new tokens, ctx = capacity, dim = head width.
"""

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from kernels.formats import E2M1, E4M3, decode, encode, round_nearest, unpack
from kernels.integers import pack_bits, span_codes, span_values, unpack_bits
from kernels.quantise import pad_to_blocks, quantise_nvfp4
from models.attention_config import Stored
from models.cache import DecoderState, Memory, resized
from models.keys_values import KeysValues, LastKeysValues

_BLOCK = 16  # channels of NVFP4
_NEWEST = ("keys", "values", "positions")  # what is kept as it was computed


def keys_values(
    state: DecoderState,
    number: int,
    k: Float[Tensor, "batch kv seq dim"],
    v: Float[Tensor, "batch kv seq dim"],
) -> "KeysValues | GroupedKeysValues":
    """Return those of branch `number`; the first call makes them, in the form of `state.stored`."""
    if number not in state.memories:
        kind = KeysValues if state.stored is None else _STORED[state.stored]
        state.memories[number] = kind.like(k, v, state.capacity)
    memory = state.memories[number]
    assert isinstance(memory, KeysValues | GroupedKeysValues)
    return memory


class StoredKeysValues(KeysValues):
    """Token by token, with a scale in bf16 for each token and head."""

    top = 0.0  # what the largest magnitude of a token becomes

    @classmethod
    def like(
        cls,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
        capacity: int,
    ) -> "StoredKeysValues":
        """See `KeysValues`."""
        tensors = {}
        for name, x in (("keys", k), ("values", v)):
            shape = (*x.shape[:2], capacity)
            tensors[name] = x.new_zeros(*shape, cls._width(x.shape[3]), dtype=torch.uint8)
            tensors[f"{name}_scales"] = x.new_zeros(*shape, 1, dtype=torch.bfloat16)
        return cls(None, **tensors)

    def write(
        self,
        state: DecoderState,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `KeysValues`; the newest are rounded too."""
        added = {}
        for name, new in (("keys", k), ("values", v)):
            scales = (new.abs().amax(dim=-1, keepdim=True) / self.top).bfloat16()
            usable = torch.where(scales > 0, scales, 1.0).to(new.dtype)
            added[name] = self._codes((new / usable).clamp(-self.top, self.top))
            added[f"{name}_scales"] = scales
        self._append(state, added)
        both = []
        for name, new in (("keys", k), ("values", v)):
            numbers = self._numbers(self._visible(state, name), new.shape[3])
            both.append((numbers * self._visible(state, f"{name}_scales").float()).to(k.dtype))
        return both[0], both[1], state.mask

    @classmethod
    def _width(cls, dim: int) -> int:
        """Return the bytes of a token's codes."""
        return dim

    def _codes(self, x: Float[Tensor, "*tokens dim"]) -> UInt8[Tensor, "*tokens width"]:
        raise NotImplementedError

    def _numbers(self, codes: UInt8[Tensor, "*tokens width"], dim: int) -> Tensor:
        raise NotImplementedError


class Int8KeysValues(StoredKeysValues):
    """In integers from -127 to 127."""

    top = 127.0

    def _codes(self, x: Tensor) -> Tensor:
        return x.round().to(torch.int8).view(torch.uint8)

    def _numbers(self, codes: Tensor, dim: int) -> Tensor:
        return codes.view(torch.int8).float()


class FP8KeysValues(StoredKeysValues):
    """In E4M3."""

    top = E4M3.max

    def _codes(self, x: Tensor) -> Tensor:
        return encode(round_nearest(x.float(), E4M3), E4M3)

    def _numbers(self, codes: Tensor, dim: int) -> Tensor:
        return decode(codes, E4M3)


class NVFP4KeysValues(StoredKeysValues):
    """In E2M1, each block with a scale in E4M3 behind the codes of its token."""

    top = E2M1.max * E4M3.max

    @classmethod
    def _width(cls, dim: int) -> int:
        padded = dim + -dim % _BLOCK
        return padded // 2 + padded // _BLOCK

    def _codes(self, x: Tensor) -> Tensor:
        padded = pad_to_blocks(x.float().flatten(0, -2), (1, _BLOCK))
        codes, scales = quantise_nvfp4(padded, amax=padded.new_full((), self.top)).packed()
        return torch.cat((codes, scales), dim=1).view(*x.shape[:-1], -1)

    def _numbers(self, codes: Tensor, dim: int) -> Tensor:
        number = -(-dim // _BLOCK)
        scales = decode(codes[..., -number:].contiguous(), E4M3)[..., None]
        elements = decode(unpack(codes[..., :-number]), E2M1)
        blocks = elements.view(*codes.shape[:-1], number, _BLOCK) * scales
        return blocks.flatten(-2)[..., :dim]


class GroupedKeysValues(Memory):
    """Keys by channel in groups of tokens, values by token; the newest as they were computed.

    A token sees itself and at least `recent` - 1 tokens before it in full, and groups that end
    before those rounded. What is rounded does not become exact again: a row cannot go back.
    """

    bits, group, recent = 0, 32, 32

    @classmethod
    def like(
        cls,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
        capacity: int,
    ) -> "GroupedKeysValues":
        """See `KeysValues`."""
        newest = LastKeysValues.like(k, v, cls.group + cls.recent)
        made = cls(newest.fills, **newest.tensors)
        for name, x in (("keys", k), ("values", v)):
            empty = x.new_zeros(*x.shape[:2], cls._groups(capacity), cls.group, x.shape[3])
            made.tensors |= cls._packed(name, empty)
        return made

    def write(
        self,
        state: DecoderState,
        k: Float[Tensor, "batch kv seq dim"],
        v: Float[Tensor, "batch kv seq dim"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `KeysValues`; first comes what is in full: the capacity moves nothing."""
        newest = LastKeysValues(self.fills, **{name: self[name] for name in _NEWEST})
        *full, positions = newest.write(state, k, v, sinks=0)
        self.tensors |= newest.tensors
        self._round(state, {"keys": full[0], "values": full[1]})
        seen = None if state.static else self._rounded(torch.tensor(state.end)) // self.group
        both = [
            torch.cat((new, self._numbers(name, new.shape[3], seen).to(new.dtype)), dim=2)
            for name, new in zip(("keys", "values"), full, strict=True)
        ]
        mask = self._mask(state, positions, both[0].shape[2] - positions.shape[1])
        return both[0], both[1], mask

    def _mask(
        self, state: DecoderState, positions: Int64[Tensor, "batch full"], ctx: int
    ) -> Bool[Tensor, "batch 1 seq all"]:
        """Return who sees which of those in full at `positions` and of `ctx` rounded tokens."""
        rounded = self._rounded(state.positions + 1)[..., None]
        at = positions[:, None]
        in_full = (at >= rounded) & (at <= state.seen[..., None])
        # Padding sees itself at least: a softmax over nothing is NaN.
        slots = self["positions"].shape[1]
        itself = torch.arange(-slots, positions.shape[1] - slots, device=at.device)
        in_full = in_full | (itself == state.offsets[:, None])
        return torch.cat((in_full, torch.arange(ctx, device=at.device) < rounded), dim=2)[:, None]

    def _round(self, state: DecoderState, full: dict[str, Tensor]) -> None:
        """Round the groups that the new tokens have pushed out of what is kept in full."""
        if not state.static:
            self._grow(state.capacity)
        before = self._rounded(state.lengths) // self.group
        added = self._rounded(state.lengths + state.new_tokens()) // self.group - before
        if not state.static and not added.any():
            return
        device, seq = added.device, len(state.offsets)
        most = torch.arange(-(-seq // self.group), device=device)
        # Where a row has fewer groups than others its last one is written again, or what is there.
        groups = before[:, None] + torch.minimum(most, added[:, None] - 1).clamp(min=0)
        tokens = groups[..., None] * self.group + torch.arange(self.group, device=device)
        slots, lengths = self["positions"].shape[1], state.lengths[:, None, None]
        places = torch.where(tokens < lengths, tokens % slots, slots + tokens - lengths)
        places = places.flatten(1).clamp(max=slots + seq - 1)[:, None, :, None]
        rows = torch.arange(len(added), device=device)[:, None]
        for name, x in full.items():
            own = x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3]))
            own = own.view(*x.shape[:2], -1, self.group, x.shape[3])
            for part, new in self._packed(name, own).items():
                at = rows, slice(None), groups.clamp(max=self[part].shape[2] - 1)
                idle = (added == 0)[:, None, None, None]
                self[part][at] = torch.where(idle, self[part][at], new.transpose(1, 2))

    @classmethod
    def _packed(cls, name: str, x: Float[Tensor, "batch kv groups group dim"]) -> dict[str, Tensor]:
        """Return groups of tokens by the names of their parts, [batch, kv, groups, size] each."""
        spans = x.transpose(3, 4) if name == "keys" else x
        flat = spans.reshape(-1, cls._span(name, x.shape[4]))
        codes, steps, least = span_codes(flat, cls.bits)
        parts = {"codes": pack_bits(codes, cls.bits), "steps": steps, "least": least}
        size = x.shape[3] * x.shape[4] // flat.shape[1]
        return {
            f"{name}_{part}": t.reshape(*x.shape[:3], size * t.shape[1])
            for part, t in parts.items()
        }

    def _numbers(self, name: str, dim: int, groups: Tensor | None) -> Float[Tensor, "b kv ctx dim"]:
        """Return the first `groups` groups in fp32, all where it is None."""
        codes, steps, least = (
            self[f"{name}_{part}"][:, :, :groups] for part in ("codes", "steps", "least")
        )
        span, shape = self._span(name, dim), codes.shape[:3]
        packed = codes.reshape(steps.numel(), -(-span * self.bits // 8))
        flat = unpack_bits(packed, self.bits, span)
        values = span_values(flat, steps.reshape(-1, 1), least.reshape(-1, 1))
        if name == "keys":
            return values.view(*shape, dim, self.group).transpose(3, 4).flatten(2, 3)
        return values.view(*shape, self.group, dim).flatten(2, 3)

    @classmethod
    def _span(cls, name: str, dim: int) -> int:
        """Return the tokens of a key's channel, or the channels of a value, that share a span."""
        return cls.group if name == "keys" or dim % cls.group == 0 else dim

    @classmethod
    def _rounded(cls, lengths: Int64[Tensor, "*any"]) -> Int64[Tensor, "*any"]:
        """Return how many tokens of texts of these lengths are rounded."""
        return (lengths - cls.recent).clamp(min=0) // cls.group * cls.group

    def of_capacity(self) -> list[Tensor]:
        """See `Memory`."""
        return [tensor for name, tensor in self.tensors.items() if name not in _NEWEST]

    @classmethod
    def _groups(cls, capacity: int) -> int:
        return max(1, (capacity - cls.recent) // cls.group)

    def _grow(self, capacity: int) -> None:
        if self._groups(capacity) > self["keys_codes"].shape[2]:
            self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """See `Memory`."""
        for name, tensor in self.tensors.items():
            if name not in _NEWEST:
                self[name] = resized(tensor, self._groups(capacity))

    def empty(self, batch: int, capacity: int) -> Memory:
        """See `Memory`."""
        made = super().empty(batch, 0)
        for name, tensor in made.tensors.items():
            if name not in _NEWEST:
                shape = (batch, tensor.shape[1], self._groups(capacity), tensor.shape[3])
                made[name] = tensor.new_zeros(shape)
        return made

    def put(self, rows: Int64[Tensor, " n"], other: Memory, capacity: int) -> None:
        """See `Memory`."""
        self._grow(capacity)
        for name, tensor in self.tensors.items():
            new = other[name]
            if name in _NEWEST:
                tensor[rows] = new
                continue
            width = min(tensor.shape[2], new.shape[2])
            tensor[rows, :, :width] = new[:, :, :width]
            tensor[rows, :, width:] = 0  # hidden by the mask; but 0 x NaN is NaN

    def cut(self, row: int, first: int, last: int) -> Memory:
        """See `Memory`."""
        whole = super().cut(row, first, last)
        for name, tensor in whole.tensors.items():
            if name not in _NEWEST:
                whole[name] = tensor[:, :, : self._groups(last)].clone()
        return whole


class Int4KeysValues(GroupedKeysValues):
    """In 16 levels."""

    bits = 4


class Int2KeysValues(GroupedKeysValues):
    """In 4 levels."""

    bits = 2


_STORED: dict[Stored, type[StoredKeysValues | GroupedKeysValues]] = {
    "int8": Int8KeysValues,
    "fp8": FP8KeysValues,
    "nvfp4": NVFP4KeysValues,
    "int4": Int4KeysValues,
    "int2": Int2KeysValues,
}
