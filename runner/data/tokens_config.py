"""The config of the training and validation text: its sources and its split."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import config, configs_of, execution, neutral
from runner.data.corpus import source_hash
from runner.data.sources import SourceConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import DataError

if TYPE_CHECKING:
    from runner.data.tokens import TextCorpus

_MIN_WEIGHT = 1e-9  # a source of weight 0 stays in the list, though nothing is taken from it


@config
class DataConfig:
    """The training and validation text.

    Args:
        sources: of the text, mixed by weight; a source of another class names it by `_target_`.
        val_fraction: share held out for validation.
        split: documents (each document is wholly in one half, chosen by its hash) or tail (the last
            part of every document). A source of one document is split at its tail in any case.
        weights: input:NAME/FILE, a JSON list of numbers that replaces the sources' weights.
        mask_documents: tokens attend within their document only.
        num_workers: loader processes (0: in the training process).
    """

    sources: tuple[Any, ...] = configs_of(SourceConfig)
    val_fraction: float = 0.05
    split: str = "documents"
    mask_documents: bool = False
    num_workers: int = execution(0)
    weights: str | None = neutral(None)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        for index, source in enumerate(self.sources):
            if not hasattr(source, "documents"):
                raise ValueError(
                    f"sources.{index}={source!r} is no source; give {{path: FILE}} or a class with "
                    "documents() by _target_"
                )
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in (0, 1)")
        if self.split not in ("documents", "tail"):
            raise ValueError(f"split={self.split!r} must be documents or tail")

    def with_weights(self, weights: Sequence[float]) -> list[Any]:
        """Return the sources with `weights` for theirs.

        Raises:
            DataError: the number of weights is not that of sources.
        """
        if len(weights) != len(self.sources):
            raise DataError(
                f"{self.weights} holds {len(weights)} weights for {len(self.sources)} "
                "data.sources; the stage that made it must mix the same ones"
            )
        pairs = zip(self.sources, weights, strict=True)
        return [replace(source, weight=max(weight, _MIN_WEIGHT)) for source, weight in pairs]

    def content_hash(self) -> list[str]:
        """Return the content hash of each source, in order."""
        return [source_hash(source) for source in self.sources]

    def check(self, tokenizer: TokenizerConfig, seq: int) -> None:
        """Accept every tokenizer and length; too short a text is found when it is read."""

    def build(
        self, tokenizer: TokenizerConfig, cache: Path, hashes: list[str] | None = None
    ) -> "TextCorpus":
        """Return the corpus; see `prepare`."""
        from runner.data.tokens import prepare  # noqa: PLC0415

        return prepare(self, tokenizer, cache, hashes)
