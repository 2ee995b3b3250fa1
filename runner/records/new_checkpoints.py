"""The checkpoints of another run as they come: evaluation beside training."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.records import checkpoint_folder, journal, metrics

_PAUSE_S = 2.0
_OVER = ("finished", "diverged", "failed")


def new_checkpoints(run: Path, after: int, stop: Callable[[], bool]) -> Iterator[Path]:
    """Yield the newest checkpoint of `run` whenever it is past `after` and the last one yielded.

    Ends when the run has ended and its last checkpoint was yielded, or `stop` comes true.
    """
    while not stop():
        over = journal.state(run) in _OVER  # asked before the folder is read
        there = checkpoint_folder.listing(run / "checkpoints")
        fresh = bool(there) and int(there[-1].name) > after
        # Its checksums are taken only where it is new.
        found = checkpoint_folder.newest(run / "checkpoints") if fresh else None
        if found is not None and int(found.name) > after:
            after = int(found.name)
            yield found
        elif over:
            return
        else:
            time.sleep(_PAUSE_S)


def last_evaluated(run: Path) -> int:
    """Return the last step that an evaluating run has validated, 0 if none."""
    return max((row["step"] for row in metrics.read(run) if "val_tokens" in row), default=0)
