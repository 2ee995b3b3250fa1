"""Random bits that are a function of their address: Philox4x32-10 (Salmon et al., SC 2011).

A sequential generator makes dropout depend on everything drawn before it: a resume, another
micro-batch or another number of processes changes the mask. Here every random word is
`philox(counter, key)`, so the mask of sample 17 in layer 3 at step 900 is the same wherever and
whenever it is drawn. Triton's `tl.philox` is the same function.

Shape legend: batch = samples, n = words of a sample.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

from kernels.compilation import Compiler, Function, current_compiler
from kernels.triton_check import triton_agrees

_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """The address of random words but for their layer and element.

    Args:
        seed: the run's seed.
        step: optimiser step.
        samples: global sample index of each row of the batch, `[batch]` int64.
    """

    seed: int
    step: int
    samples: Int64[Tensor, " batch"]


def philox(
    counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Return four words for each counter of four words, each of 32 bits.

    Words are int32, whose products wrap, as the algorithm wants them, and compile to vector code;
    or int64 in [0, 2**32), keys too, with which eager code takes a third of the operations.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (_signed(k) if isinstance(k, int) else k for k in key)
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(c0, _M0)
        hi1, lo1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = _add(k0, _W0), _add(k1, _W1)
    return c0, c1, c2, c3


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the unsigned product `a * m`; in int32 by halves of 16 bits."""
    if a.dtype == torch.int64:
        product = a * m
        return (product >> 32) & _MASK, product & _MASK
    low, high = a & 0xFFFF, (a >> 16) & 0xFFFF
    m_low, m_high = m & 0xFFFF, m >> 16
    middle = high * m_low + _high_half(low * m_low)
    other = low * m_high + (middle & 0xFFFF)
    return high * m_high + _high_half(middle) + _high_half(other), a * _signed(m)


def _high_half(a: Tensor) -> Tensor:
    return (a >> 16) & 0xFFFF  # the shift drags the sign along


def _signed(word: int) -> int:
    return ((word & _MASK) ^ 0x80000000) - 0x80000000


def _add(word: int | Tensor, step: int) -> int | Tensor:
    if isinstance(word, int):
        return _signed(word + step)
    return (word + step) & _MASK if word.dtype == torch.int64 else word + _signed(step)


def gumbel(
    seeds: Int64[Tensor, " batch"],
    samples: Int64[Tensor, " batch"],
    positions: Int64[Tensor, " batch"],
    n: int,
) -> Float[Tensor, "batch n"]:
    """Return `n` standard Gumbel variables for each row, fp32: a pure function of the arguments.

    argmax(logits + gumbel) is a draw from softmax(logits).

    Args:
        seeds, samples: at least 0.
        positions: at least 0, below 2**32.
    """
    seeds, samples, positions = (x[:, None] for x in (seeds, samples, positions))
    blocks = torch.arange(-(-n // 4), device=seeds.device)[None].expand(len(seeds), -1)
    counter = (blocks, positions, samples & _MASK, samples >> 32)
    words = torch.stack(philox(counter, (seeds & _MASK, seeds >> 32)), dim=-1).flatten(-2)[:, :n]
    # Small numbers decide who wins, and fp32 is finest near 0; at 1 it would give -inf.
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def random_words(key: NoiseKey, layer: int, n: int) -> Int64[Tensor, "batch n"]:
    """Return `n` 32-bit words of each sample, as int64: a pure function of the arguments."""
    words: Tensor = _random_words(key.samples, key.seed, key.step, layer, n)
    return words


# An op is opaque to torch.compile: compiled code draws the bits that eager code draws.
@torch.library.custom_op("espalier::random_words", mutates_args=())
def _random_words(samples: Tensor, seed: int, step: int, layer: int, n: int) -> Tensor:
    # The step joins the seed in the key; 2**32 steps and seeds are more than anyone trains.
    dice = Dice.of(NoiseKey(seed=seed, step=step, samples=samples))
    return _philox_words(dice, layer, n, _words_of)[:, :n].long() & _MASK


@_random_words.register_fake
def _(samples: Tensor, seed: int, step: int, layer: int, n: int) -> Tensor:
    return samples.new_empty(samples.shape[0], n)


def _philox_words(dice: "Dice", stream: int, n: int, make: Function) -> Tensor:
    """Return at least `n` words of each sample, in int32; `make` draws them but on a GPU."""
    if triton_agrees(dice.samples.device, _compare):
        from kernels import triton_philox  # noqa: PLC0415

        return triton_philox.words(dice.samples, dice.key, stream, -(-n // 4))
    words = torch.cat((dice.key, torch.full_like(dice.key[:1], stream)))
    blocks = torch.arange(-(-n // 4), dtype=torch.int32, device=dice.samples.device)
    return make(dice.samples, words, blocks)[0]


def keep_mask(key: NoiseKey, layer: int, n: int, drop: float) -> Bool[Tensor, "batch n"]:
    """Return a mask, each element True with probability 1 - `drop` (to within 2**-32)."""
    return random_words(key, layer, n) >= round(drop * 2**32)


def dropout(
    x: Float[Tensor, "batch *rest"], drop: float, key: NoiseKey | None, layer: int
) -> Float[Tensor, "batch *rest"]:
    """Return `x` with elements zeroed with probability `drop` and the rest scaled by 1/(1-drop).

    `key=None` (evaluation) or `drop=0` returns `x` itself.
    """
    if key is None or drop == 0.0:
        return x
    keep = keep_mask(key, layer, x[0].numel(), drop).view(x.shape)
    return x * keep.to(x.dtype) / (1.0 - drop)


@dataclass(frozen=True)
class Dice:
    """A NoiseKey as tensors, so that compiled code does not see a new constant at every step.

    Args:
        samples: global sample index of each row of the batch, int64.
        key: the words (seed, step), int32.
    """

    samples: Int64[Tensor, " batch"]
    key: Int32[Tensor, " 2"]

    @staticmethod
    def of(noise: NoiseKey) -> "Dice":
        """Return the dice of `noise`."""
        # Filled in where they lie: the host would wait until a GPU has copied them.
        words = noise.samples.new_empty(2, dtype=torch.int32)
        words[0].fill_(_signed(noise.seed))
        words[1].fill_(_signed(noise.step))
        return Dice(noise.samples, words)


def rounding_bits(dice: Dice, stream: int, rows: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """Return a random byte for each element of a matrix whose rows are tokens.

    Rows are the tokens of `dice.samples`, sample after sample; rows of other tokens (those sent to
    an expert) take the bytes of their index among all rows. Byte i of a word serves element i of
    its four, as in Blackwell's stochastic cvt.

    Args:
        stream: tells the matrices of one step apart; the layers of dropout are streams too.
    """
    per_sample = -(-rows // len(dice.samples)) * cols
    bits: Tensor = _rounding_bits(dice.samples, dice.key, stream, per_sample)
    return bits.view(-1, cols)[:rows]


@dataclass(frozen=True)
class Draw:
    """The random bytes of one matrix before they are drawn: a kernel may draw them where it rounds.

    Args:
        dice: of the tokens that are the matrix's rows.
        stream: see `rounding_bits`.
        tokens: rows beyond these are padding, whose bytes are 0.
    """

    dice: Dice
    stream: int
    tokens: int

    def bits(self, rows: int, cols: int) -> UInt8[Tensor, "rows cols"]:
        """Return the bytes."""
        drawn = rounding_bits(self.dice, self.stream, self.tokens, cols)
        return F.pad(drawn, (0, 0, 0, rows - self.tokens)) if rows > self.tokens else drawn


@torch.library.custom_op("espalier::rounding_bits", mutates_args=())
def _rounding_bits(samples: Tensor, key: Tensor, stream: int, count: int) -> Tensor:
    on_cpu = samples.device.type == "cpu"
    make = _words_on_cpu(current_compiler()) if on_cpu else _words_of
    words = _philox_words(Dice(samples, key), stream, -(-count // 4), make)
    return words.view(torch.uint8)[:, :count].contiguous()


@_rounding_bits.register_fake
def _(samples: Tensor, key: Tensor, stream: int, count: int) -> Tensor:
    return samples.new_empty(samples.shape[0], count, dtype=torch.uint8)


def eager_bits(dice: Dice, stream: int, rows: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """Return `rounding_bits` by the eager reference on any device, for whole samples."""
    blocks = torch.arange(rows * cols // len(dice.samples) // 16, device=dice.samples.device)
    words = torch.cat((dice.key, torch.full_like(dice.key[:1], stream)))
    return _words_of(dice.samples, words, blocks.int())[0].view(torch.uint8).view(rows, cols)


def _compare(device: torch.device) -> None:
    """Raise ValueError where Triton's words differ from the reference's."""
    from kernels import triton_philox  # noqa: PLC0415

    samples = torch.tensor([7, 1 << 40], device=device)
    dice = Dice(samples, torch.tensor([-5, 3], dtype=torch.int32, device=device))
    drawn = triton_philox.words(samples, dice.key, 9, 64).view(torch.uint8)
    if not torch.equal(drawn, eager_bits(dice, 9, 2, 1024)):
        raise ValueError("random bits differ from the reference")


@lru_cache
def _words_on_cpu(compiler: Compiler) -> Function:
    example = (torch.arange(3), torch.zeros(3, dtype=torch.int32), torch.arange(5).int())
    return compiler(_words_of, "philox", example, ({0: "s"}, {}, {0: "b"}))


def _words_of(samples: Tensor, key: Tensor, blocks: Tensor) -> tuple[Tensor]:
    """Return four words for each of `blocks` of each sample; `key` is (seed, step, stream)."""
    rows = samples[:, None]
    zeros = torch.zeros_like(rows + blocks, dtype=torch.int32)
    counter = (zeros + blocks, zeros + rows.int(), zeros + (rows >> 32).int(), zeros + key[2])
    return (torch.stack(philox(counter, (key[0], key[1])), dim=-1).flatten(-2),)
