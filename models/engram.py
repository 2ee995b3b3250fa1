"""Engram: a memory that is looked up by the last two or three tokens (arXiv 2601.07372; deepseek-ai/Engram).

Each n-gram that ends at a token is hashed to a row of a table, once for each of several heads; the rows together are
what is remembered. How much of it enters the residual stream, its agreement with the stream decides:

    e = rows of the tables;  k = W_K e;  v = W_V e
    gate = sigmoid(rms(h) . rms(k) / sqrt(dim))
    h += silu(conv(rms(gate v))) + gate v

Shape legend: batch, seq, dim = model width, orders = n-gram lengths, slots = orders x heads.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kernels.short_conv import short_conv
from models.branch import Context, Notes
from models.cache import with_history
from models.config import config
from models.flops import linear_flops
from models.layers import RMSNorm

if TYPE_CHECKING:
    from models.decoder import DecoderConfig

_NOTHING = -1  # before the text, and across the end of a document


@config
class EngramConfig:
    """A memory of n-grams.

    Args:
        table_size: rows of a head's table at least: each takes the next prime that no other has.
        slot_dim: width of a row. orders: lengths of n-grams. num_heads: hashes of each.
        kernel: taps of the convolution, spread by the longest order.
        compress: tokens that differ in case, accents or spaces only count as one (needs a tokenizer).
        learning_rate_scale: of the tables, beside the optimiser's rate; they never decay.
        hash_seed: of the multipliers.
    """

    name: ClassVar[str] = "engram"
    normed: ClassVar[bool] = False
    looks_back: ClassVar[bool] = True

    table_size: int
    slot_dim: int = 16
    orders: tuple[int, ...] = (2, 3)
    num_heads: int = 8
    kernel: int = 4
    compress: bool = True
    learning_rate_scale: float = 5.0
    hash_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("table_size", "slot_dim", "num_heads", "kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.orders or min(self.orders) < 1:
            raise ValueError(f"orders={self.orders} must be lengths of n-grams, (2, 3) for example")

    def build(self, host: "DecoderConfig", number: int, vocab_size: int) -> "Engram":
        """See `PartConfig`."""
        return Engram(self, host, number, vocab_size)

    @property
    def slots(self) -> int:
        """Tables."""
        return len(self.orders) * self.num_heads

    def sizes(self, host: "DecoderConfig", number: int) -> tuple[int, ...]:
        """Return the rows of each table: primes that no other Engram of the decoder with this size uses."""
        parts = [part for layer in host.branches() for part in layer]
        before = sum(isinstance(part, EngramConfig) for part in parts[:number])
        return primes(self.table_size, (before + 1) * self.slots)[before * self.slots :]

    def num_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`."""
        return sum(self.sizes(host, number)) * self.slot_dim + self._dense(host)

    def num_active_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`: one row of each table."""
        return self.slots * self.slot_dim + self._dense(host)

    def _dense(self, host: "DecoderConfig") -> int:
        return host.width * (2 * self.slots * self.slot_dim + self.kernel + 3)

    def forward_flops(self, host: "DecoderConfig", seq: int) -> tuple[int, int]:
        """See `PartConfig`."""
        found = 2 * linear_flops(seq, self.slots * self.slot_dim, host.width)
        return found, found


class Engram(nn.Module):
    """See `EngramConfig`."""

    lookups = ("table",)

    def __init__(
        self, cfg: EngramConfig, host: "DecoderConfig", number: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.cfg, self.number = cfg, number
        self.sizes = cfg.sizes(host, number)
        self.multipliers = _multipliers(cfg, number)
        self.table = nn.Parameter(torch.empty(sum(self.sizes), cfg.slot_dim))
        self.key = nn.Linear(cfg.slots * cfg.slot_dim, host.width, bias=False)
        self.value = nn.Linear(cfg.slots * cfg.slot_dim, host.width, bias=False)
        self.stream_norm, self.key_norm, self.conv_norm = (RMSNorm(host.width, host.norm_eps) for _ in range(3))  # fmt: skip
        self.conv = nn.Parameter(torch.zeros(host.width, cfg.kernel))
        self.initial_std = {"conv": 0.0}
        self.learning_rate_scale = {"table": cfg.learning_rate_scale}
        # Which token each counts as; until `read_vocabulary` each as itself.
        self.canonical: Tensor
        self.register_buffer("canonical", torch.arange(vocab_size))

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> tuple[Float[Tensor, "batch seq dim"], Notes]:
        cfg = self.cfg
        remembered = self._remembered(x, context)
        gate = self._gate(x, remembered)
        value = gate * self.value(remembered)
        dilation = max(cfg.orders)
        past = with_history(context.state, self.number, "conv", self.conv_norm(value), (cfg.kernel - 1) * dilation)  # fmt: skip
        mixed = short_conv(past, self.conv, dilation=dilation, documents=context.documents)
        return F.silu(mixed) + value, {"gate": gate.detach().float().mean()}

    def gates(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq"]:
        """Return how much of what is remembered each token takes, between 0 and 1."""
        return self._gate(x, self._remembered(x, context))[..., 0]

    def _remembered(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq memory"]:
        return self.table[self.rows(context)].flatten(2).to(x.dtype)

    def _gate(
        self, x: Float[Tensor, "batch seq dim"], remembered: Float[Tensor, "batch seq memory"]
    ) -> Float[Tensor, "batch seq 1"]:
        agreement = self.stream_norm(x) * self.key_norm(self.key(remembered))
        return torch.sigmoid(agreement.sum(dim=-1, keepdim=True) * x.shape[-1] ** -0.5)

    def rows(self, context: Context) -> Int64[Tensor, "batch seq slots"]:
        """Return the row of the table that each head of each order looks up for each token."""
        ids = self.canonical[context.tokens]
        longest = max(self.cfg.orders)
        past = with_history(context.state, self.number, "ids", ids, longest - 1, fill=_NOTHING)
        seq, first = ids.shape[1], 0
        found: list[Tensor] = []
        for order in self.cfg.orders:
            mixed = None
            for back in range(order):
                earlier = past[:, longest - 1 - back : longest - 1 - back + seq]
                if back and context.documents is not None:
                    whose = F.pad(context.documents, (back, 0), value=_NOTHING)[:, :seq]
                    earlier = earlier.masked_fill(whose != context.documents, _NOTHING)
                product = (earlier + 1) * self.multipliers[back]  # `nothing` is 0
                mixed = product if mixed is None else mixed ^ product
            assert mixed is not None
            for _ in range(self.cfg.num_heads):
                size = self.sizes[len(found)]
                found.append(first + mixed % size)
                first += size
        return torch.stack(found, dim=-1)

    def read_vocabulary(self, texts: Sequence[str]) -> None:
        """Let tokens count as one whose texts are equal but for case, accents and spaces."""
        if not self.cfg.compress:
            return
        first: dict[str, int] = {}
        ids = [first.setdefault(_compressed(text), index) for index, text in enumerate(texts)]
        self.canonical.copy_(torch.tensor(ids))


def _compressed(text: str) -> str:
    """NFKC, NFD, without accents, in lower case, runs of white space as one; what is only that stays as it is."""
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    plain = "".join(c for c in plain if not unicodedata.combining(c)).lower()
    plain = " ".join(plain.split()) if plain.strip() else plain
    return plain or text


@lru_cache
def primes(least: int, count: int) -> tuple[int, ...]:
    """Return the first `count` primes from `least` on."""
    top = max(64, least + 40 * count * max(1, least.bit_length()))
    sieve = np.ones(top + 1, dtype=bool)
    sieve[:2] = False
    for number in range(2, int(top**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = False
    found = np.flatnonzero(sieve)
    return tuple(int(p) for p in found[found >= least][:count])


def _multipliers(cfg: EngramConfig, number: int) -> list[int]:
    """Return an odd number for each place of an n-gram, so large that no product with an id below 2^22 overflows."""
    random = np.random.default_rng([cfg.hash_seed, number])
    return [int(m) * 2 + 1 for m in random.integers(2**38, 2**39, max(cfg.orders))]
