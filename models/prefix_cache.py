"""A prefix cache: a text that begins as an earlier one does goes on from that one's state.

Texts are cut into blocks of equally many tokens. A block is named by the hash of its tokens and of
its parent's name, so that equal beginnings are one chain of blocks and branches part at the first
block that differs. A block holds what its tokens added to the state: slices of keys and values; a
state that is overwritten, as a recurrent one, only as it was at the block's end. Blocks are never
written again: each text copies them into its own state and goes on there.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.cache import DecoderState, Memory, State


@dataclass
class _Block:
    """What the tokens of a block added to the state of one row.

    Args:
        memories: by number of the branch.
        complete: whether a text can go on from its end; if not, it is only on the way to others.
    """

    memories: dict[int, Memory]
    complete: bool

    def __post_init__(self) -> None:
        self.num_bytes = sum(memory.num_bytes() for memory in self.memories.values())


class PrefixCache:
    """Blocks of the texts read by one model with unchanged weights; see the file.

    Args:
        block: tokens of a block.
        max_bytes: the most that it holds; then the blocks go that were not used for longest, the
            end of a text before its beginning.
    """

    def __init__(self, *, block: int, max_bytes: int) -> None:
        if block < 1:
            raise ValueError(f"block={block} must be at least 1 token")
        self.block, self.max_bytes = block, max_bytes
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()  # least recently used first
        self._num_bytes = 0

    def load(self, ids: Sequence[int], state: State, row: int = 0, *, salt: str = "") -> int:
        """Replace row `row` by the state after the longest known prefix; return its tokens.

        It is whole blocks of `ids`; without one the row stays as it is.

        Args:
            salt: only texts saved with the same salt are known.
        """
        names = self._known(self._names(ids, salt))
        while names and not self._blocks[names[-1]].complete:
            names.pop()
        if not names or not isinstance(state, DecoderState):
            return 0
        self._touch(names)
        blocks = [self._blocks[name] for name in names]
        length, device = len(names) * self.block, state.lengths.device
        prefix = DecoderState(1, capacity=length, device=device)
        prefix.memories = {
            number: last.joined([b.memories[number] for b in blocks if number in b.memories])
            for number, last in blocks[-1].memories.items()
        }
        prefix.lengths = torch.full_like(prefix.lengths, length)
        state.put(torch.tensor([row], device=device), prefix)
        return length

    def save(self, ids: Sequence[int], state: State, row: int = 0, *, salt: str = "") -> None:
        """Keep the blocks of `ids`, which are all that row `row` has read, if they are new.

        A recurrent state can be kept at its present length only: read so that passes end where
        blocks end (`until_block_end`).
        """
        if not isinstance(state, DecoderState):
            return
        names = self._names(ids, salt)
        for number, name in enumerate(names):
            last = (number + 1) * self.block
            complete = state.can_truncate or last == len(ids)
            old = self._blocks.get(name)
            if old is None or (complete and not old.complete):
                self._add(name, _cut(state, row, last - self.block, last, complete=complete))
        self._touch(names)
        while self._num_bytes > self.max_bytes:
            _, block = self._blocks.popitem(last=False)
            self._num_bytes -= block.num_bytes

    def until_block_end(self, length: int, most: int) -> int:
        """Return how many tokens to read next, `most` at most, after `length`.

        The pass then ends where a block ends, if one ends within `most` tokens.
        """
        whole = (length + most) // self.block * self.block - length
        return whole if whole > 0 else most

    def clear(self) -> None:
        """Forget all, as new weights demand."""
        self._blocks.clear()
        self._num_bytes = 0

    def num_bytes(self) -> int:
        """Return the size of all blocks in bytes."""
        return self._num_bytes

    def _names(self, ids: Sequence[int], salt: str) -> list[bytes]:
        """Return the names of the whole blocks of `ids`."""
        names, parent = [], hashlib.blake2b(salt.encode(), digest_size=16).digest()
        for first in range(0, len(ids) - self.block + 1, self.block):
            content = ",".join(map(str, ids[first : first + self.block])).encode()
            parent = hashlib.blake2b(parent + content, digest_size=16).digest()
            names.append(parent)
        return names

    def _known(self, names: list[bytes]) -> list[bytes]:
        missing = (number for number, name in enumerate(names) if name not in self._blocks)
        return names[: next(missing, len(names))]

    def _touch(self, names: list[bytes]) -> None:
        """Mark as used just now: children first, so that none outlives its parent."""
        for name in reversed(names):
            self._blocks.move_to_end(name)

    def _add(self, name: bytes, block: _Block) -> None:
        old = self._blocks.get(name)
        self._num_bytes += block.num_bytes - (0 if old is None else old.num_bytes)
        self._blocks[name] = block


def _cut(state: DecoderState, row: int, first: int, last: int, *, complete: bool) -> _Block:
    memories = {
        number: memory.cut(row, first, last)
        for number, memory in state.memories.items()
        if complete or memory.can_truncate
    }
    return _Block(memories, complete)
