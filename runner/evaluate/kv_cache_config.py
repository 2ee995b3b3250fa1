"""The evaluation of keys and values that are kept in few bits."""

from collections.abc import Mapping

from models.attention_config import Stored
from models.config import config, execution
from runner.evaluate.config import Cadence
from runner.records.contracts import Trained


@config
class KvCacheConfig:
    """The loss on held-out text that is read through a cache of keys and values, by its format.

    Args:
        formats: that keys and values are kept in.
        every: steps between two evaluations, "validation", or None: at the end.
    """

    formats: tuple[Stored, ...] = ("int8", "fp8", "nvfp4", "int4", "int2")
    every: Cadence = execution(None)

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats={list(self.formats)} must be some, each named once")

    def run(self, trained: Trained, step: int) -> Mapping[str, float]:
        """Return `kv_loss_delta/FORMAT` and others; see `runner.evaluate.kv_cache`."""
        from runner.evaluate.kv_cache import measure_kv_cache  # noqa: PLC0415

        return measure_kv_cache(self, trained)
