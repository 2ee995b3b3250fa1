"""Random bits in Triton, drawn where they are used: the words of `kernels.philox`.

Sixteen neighbours in a row share one call of the generator: four words of four bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = tl.constexpr(256)  # of four words, in one program


def words(samples: Tensor, key: Tensor, stream: int, blocks: int) -> Tensor:
    """Return four words for each of `blocks` of each sample, `[samples, 4 * blocks]` int32.

    Args:
        samples, key: of `kernels.philox.Dice`.
    """
    out = torch.empty(len(samples), 4 * blocks, dtype=torch.int32, device=samples.device)
    grid = (len(samples), triton.cdiv(blocks, _BLOCKS.value))
    _words[grid](samples, key, out, stream, blocks)
    return out


@triton.jit(do_not_specialize=["stream", "blocks"])
def _words(samples, key, out, stream, blocks):
    sample = tl.program_id(0)
    block = tl.program_id(1) * _BLOCKS + tl.arange(0, _BLOCKS)
    index = tl.load(samples + sample) + tl.zeros_like(block)
    a, b, c, d = philox(block, index, stream, key)
    four = tl.reshape(interleave(a, b, c, d), (4 * _BLOCKS,)).to(tl.int32, bitcast=True)
    place = tl.program_id(1) * 4 * _BLOCKS + tl.arange(0, 4 * _BLOCKS)
    row = out + sample.to(tl.int64) * 4 * blocks
    tl.store(row + place, four, mask=place < 4 * blocks)


@triton.jit
def philox(block, sample, stream, key):
    """Four uint32 words of Philox4x32-10 for each counter (block, sample, stream).

    block, sample: int32 and int64 tensors of one shape; key: pointer to (seed, step).
    """
    low, high = tl.load(key).to(tl.int64) & 0xFFFFFFFF, tl.load(key + 1).to(tl.int64)
    # Bits, not values: a conversion of negative numbers would be undefined.
    c0 = block.to(tl.uint32, bitcast=True)
    c1 = (sample & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (block * 0 + stream).to(tl.uint32, bitcast=True)
    return tl.philox((high << 32) | low, c0, c1, c2, c3)


@triton.jit
def interleave(a, b, c, d):
    """[..., 2, 2] with a, b, c, d in the order of memory."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def dice(samples, key, stream, tokens, per_sample, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The bytes of a tile, as fp32; 0 in rows beyond `tokens`, which are padding."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * (COLS // 16) + tl.arange(0, COLS // 16)[None, :]
    sample = row // per_sample
    index = tl.load(samples + sample, mask=row < tokens, other=0)
    block = (row - sample * per_sample) * (cols // 16) + group
    a, b, c, d = philox(block, index + group * 0, stream, key)
    word = tl.reshape(interleave(a, b, c, d), (ROWS, COLS // 4))
    four = interleave(word & 255, (word >> 8) & 255, (word >> 16) & 255, word >> 24)
    byte = tl.reshape(four, (ROWS, COLS)).to(tl.float32)
    return tl.where(row < tokens, byte, 0.0)
