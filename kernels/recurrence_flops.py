"""FLOPs of `kernels/recurrence.py`, by a formula that needs no torch."""

PER_DIMENSION = 16  # tokens of a chunk, at most, where each key dimension has its own decay


def recurrence_flops(
    seq: int, heads: int, k: int, v: int, *, chunk: int, delta: bool, wide: bool
) -> int:
    """Return the FLOPs of the products in `recurrence`, without the delta rule's triangular solve.

    Args:
        k, v: widths of keys and values; wide: each key dimension has its own decay.
    """
    size = min(chunk, PER_DIMENSION if wide else chunk, seq)
    rows = -(-seq // size) * size
    pairs = 2 * rows * size * (k * (2 if delta else 1) + v)
    return heads * (pairs + 2 * rows * k * v * (3 if delta else 2))
