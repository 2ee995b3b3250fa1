"""Random bits that are a function of their address: Philox4x32-10 (Salmon et al., SC 2011).

A sequential generator makes dropout depend on everything drawn before it: a resume, another
micro-batch or another number of processes changes the mask. Here every random word is
`philox(counter, key)`, so the mask of sample 17 in layer 3 at step 900 is the same wherever and
whenever it is drawn. Triton's `tl.philox` is the same function.

Shape legend: batch = samples, n = words asked for.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """Where in training a random word is drawn: everything but the layer and the element.

    Args:
        seed: the run's seed.
        step: optimiser step.
        samples: global sample index of each row of the batch, `[batch]` int64.
    """

    seed: int
    step: int
    samples: Int64[Tensor, " batch"]


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four words for each counter of four words, all int64 tensors holding 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(c0, _M0)
        hi1, lo1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `a * m`. The product is split because int64 is signed."""
    low_half = a * (m & 0xFFFF)
    high_half = a * (m >> 16)
    middle = (low_half >> 16) + high_half
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_half & 0xFFFF)


def random_words(key: NoiseKey, layer: int, n: int) -> Int64[Tensor, "batch n"]:
    """Return `n` 32-bit words (as int64) for each sample: a pure function of the arguments."""
    words: Tensor = _random_words(key.samples, key.seed, key.step, layer, n)
    return words


# Opaque to torch.compile, which so draws the bits that eager draws (and Inductor 2.13 turns int64 shifts
# into C++ that does not compile).
@torch.library.custom_op("espalier::random_words", mutates_args=())
def _random_words(samples: Tensor, seed: int, step: int, layer: int, n: int) -> Tensor:
    blocks = torch.arange(-(-n // 4), device=samples.device)
    samples = samples[:, None]
    zeros = torch.zeros_like(samples + blocks)
    counter = (
        zeros + blocks,
        zeros + (samples & _MASK),
        zeros + (samples >> 32),
        zeros + layer,
    )
    # The step joins the seed in the key; 2**32 steps and seeds are more than anyone trains.
    words = philox(counter, (seed, step))
    return torch.stack(words, dim=-1).flatten(-2)[:, :n].contiguous()


@_random_words.register_fake
def _(samples: Tensor, seed: int, step: int, layer: int, n: int) -> Tensor:
    return samples.new_empty(samples.shape[0], n)


def keep_mask(key: NoiseKey, layer: int, n: int, drop: float) -> Bool[Tensor, "batch n"]:
    """Return True with probability 1 - `drop` (to within 2**-32) for each element."""
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
