"""The config of giving texts the likeliest of a few labels."""

import hashlib
from collections.abc import Mapping
from typing import Any

from models.config import config, execution
from runner.data.labelled_texts import LabelledFile
from runner.evaluate.config import Cadence
from runner.records.contracts import Trained


@config
class LabelsConfig:
    """Gives each text of a file the label whose words are likeliest, after worked examples if any.

    Args:
        source: the texts.
        examples: where worked examples come from (None: there are none).
        shots: worked examples before a text, the same before each, their labels in turn.
        shots_seed: draws them.
        name: begins the names of the values, NAME/accuracy; differs from those of others.
        limit: the most texts, evenly spaced through the file (None: all).
        rows: the most texts that are read at a time.
        every: steps between two evaluations, or "validation" (None: at the end).
    """

    source: LabelledFile
    examples: LabelledFile | None = None
    shots: int = 0
    shots_seed: int = 0
    name: str = "labels"
    limit: int | None = None
    rows: int = execution(64)
    every: Cadence = execution(None)

    def __post_init__(self) -> None:
        if (self.shots > 0) != (self.examples is not None) or self.shots < 0:
            raise ValueError(
                f"shots={self.shots} worked examples are drawn from `examples`, a file of its own "
                "(that of training); give both or neither"
            )
        for name in ("limit", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.examples is not None and self.examples.words != self.source.words:
            raise ValueError(
                f"examples.words={list(self.examples.words)} must be those of the source, "
                f"{list(self.source.words)}"
            )

    def content_hash(self) -> str:
        """Return the hash of the files."""
        files = [file.content_hash() for file in (self.source, self.examples) if file is not None]
        return hashlib.sha256(":".join(files).encode()).hexdigest()[:32]

    def run(self, trained: Trained, step: int) -> Mapping[str, Any]:
        """Return NAME/accuracy, NAME/f1 and what `runner.evaluate.labels` lists."""
        from runner.evaluate.labels import give_labels  # noqa: PLC0415

        return give_labels(self, trained)
