"""A kind of work: count the letters of the training text, so many documents at a time."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from runner.work.outputs import write_output


@dataclass(frozen=True, kw_only=True)
class CountLettersConfig:
    """It reads the data alone: no model is built, none need be named."""

    reads: ClassVar[tuple[str, ...]] = ("data",)
    outputs: ClassVar[tuple[str, ...]] = ("letters.json",)

    top: int = 3
    pause_s: float = 0.0

    def run(
        self, cell: Any, inputs: Any, journal: Any, ranks: Any, stop: Callable[[], bool]
    ) -> Literal["finished", "interrupted"]:
        """Write outputs/letters.json: the `top` commonest characters."""
        if journal is None:
            return "finished"
        counts: Counter[str] = Counter()
        read = 0
        for source in cell.config.data.sources:
            for text in source.documents():
                if stop():
                    return "interrupted"
                counts.update(text)
                read += 1
                journal.metrics(read, {"documents": read})
                time.sleep(self.pause_s)
        found = dict(counts.most_common(self.top))
        write_output(cell.folder, "letters.json", json.dumps(found), journal)
        return "finished"
