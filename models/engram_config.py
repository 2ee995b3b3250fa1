"""Engram as data: a memory that is looked up by the last two or three tokens."""

from functools import lru_cache
from itertools import compress, islice
from typing import TYPE_CHECKING, ClassVar

from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.engram import Engram


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
    has_filters: ClassVar[bool] = True

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

    def build(self, host: Host, number: int, vocab_size: int) -> "Engram":
        """See `BranchConfig`."""
        from models.engram import Engram  # noqa: PLC0415

        return Engram(self, host, number, vocab_size)

    @property
    def slots(self) -> int:
        """Tables."""
        return len(self.orders) * self.num_heads

    def sizes(self, host: Host, number: int) -> tuple[int, ...]:
        """Return the rows of each table: primes that no other Engram of the decoder with this size uses."""
        parts = [part for layer in host.branches() for part in layer]
        before = sum(isinstance(part, EngramConfig) for part in parts[:number])
        return primes(self.table_size, (before + 1) * self.slots)[before * self.slots :]

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return sum(self.sizes(host, number)) * self.slot_dim + self._dense(host)

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`: one row of each table."""
        return self.slots * self.slot_dim + self._dense(host)

    def _dense(self, host: Host) -> int:
        return host.width * (2 * self.slots * self.slot_dim + self.kernel + 3)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`."""
        found = 2 * linear_flops(seq, self.slots * self.slot_dim, host.width)
        return found, found


@lru_cache
def primes(least: int, count: int) -> tuple[int, ...]:
    """Return the first `count` primes from `least` on."""
    top = max(64, least + 40 * count * max(1, least.bit_length()))
    sieve = bytearray(b"\1") * (top + 1)
    sieve[:2] = b"\0\0"
    for number in range(2, int(top**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, top + 1, number)))
    return tuple(islice(compress(range(least, top + 1), sieve[least:]), count))
