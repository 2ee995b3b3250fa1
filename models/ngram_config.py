"""An n-gram model as data."""

from models.config import config


@config
class NgramConfig:
    """An n-gram of `order` tokens; `discount` is taken from every count (None: n1 / (n1 + 2 n2) of each order)."""

    order: int = 4
    discount: float | None = None

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order={self.order} must be at least 1")
        if self.discount is not None and not 0.0 < self.discount < 1.0:
            raise ValueError(f"discount={self.discount} must lie in (0, 1)")
