"""The config of Engram: a memory looked up by the last two or three tokens."""

from functools import lru_cache
from itertools import compress, islice
from typing import TYPE_CHECKING, Any, ClassVar

from models.branch_config import Host
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.engram import Engram


@config
class EngramConfig:
    """A memory of n-grams.

    Args:
        table_size: least number of rows of a table; each table takes the next prime not yet used.
        slot_dim: width of a row.
        orders: lengths of the n-grams.
        num_heads: hashes, and so tables, of each order.
        kernel: taps of the convolution; its dilation is the longest order.
        compress: count tokens that differ only in case, accents or spaces as one (needs a
            tokenizer).
        learning_rate_scale: factor on the optimiser's learning rate for the tables.
        hash_seed: seed of the hash multipliers.
    """

    name: ClassVar[str] = "engram"
    normed: ClassVar[bool] = False
    looks_back: ClassVar[bool] = True
    has_filters: ClassVar[bool] = True

    numerics = 2  # revision 1 counted each token of nothing but white space as its own

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

    def numerics_with(self, model: Any) -> int:
        """Return the numerics revision: without `compress` nothing has changed since the first."""
        return self.numerics if self.compress else 1

    def build(self, host: Host, number: int, vocab_size: int) -> "Engram":
        """See `BranchConfig`."""
        from models.engram import Engram  # noqa: PLC0415

        return Engram(self, host, number, vocab_size)

    @property
    def slots(self) -> int:
        """Number of tables."""
        return len(self.orders) * self.num_heads

    def sizes(self, host: Host, number: int) -> tuple[int, ...]:
        """Return the rows of each table: primes that no earlier Engram of the decoder uses."""
        parts = [part for layer in host.branches() for part in layer]
        before = sum(isinstance(part, EngramConfig) for part in parts[:number])
        return primes(self.table_size, (before + 1) * self.slots)[before * self.slots :]

    def num_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`."""
        return sum(self.sizes(host, number)) * self.slot_dim + self._dense(host)

    def num_active_parameters(self, host: Host, number: int) -> int:
        """See `BranchConfig`; of each table one row counts."""
        return self.slots * self.slot_dim + self._dense(host)

    def _dense(self, host: Host) -> int:
        return host.width * (2 * self.slots * self.slot_dim + self.kernel + 3)

    def forward_flops(self, host: Host, seq: int) -> tuple[int, int]:
        """See `BranchConfig`."""
        flops = 2 * linear_flops(seq, self.slots * self.slot_dim, host.width)
        return flops, flops


@lru_cache
def primes(least: int, count: int) -> tuple[int, ...]:
    """Return the `count` smallest primes that are at least `least`."""
    top = max(64, least + 40 * count * max(1, least.bit_length()))
    sieve = bytearray(b"\1") * (top + 1)
    sieve[:2] = b"\0\0"
    for number in range(2, int(top**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, top + 1, number)))
    return tuple(islice(compress(range(least, top + 1), sieve[least:]), count))
