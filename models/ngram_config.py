"""The config of an n-gram model."""

from models.config import config


@config
class NgramConfig:
    """An n-gram model.

    Args:
        order: length of its n-grams in tokens.
        discount: subtracted from every count (None: for each order n1 / (n1 + 2 n2), n1 and n2
            being the numbers of n-grams seen once and twice).
    """

    order: int = 4
    discount: float | None = None

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order={self.order} must be at least 1")
        if self.discount is not None and not 0.0 < self.discount < 1.0:
            raise ValueError(f"discount={self.discount} must lie in (0, 1)")
