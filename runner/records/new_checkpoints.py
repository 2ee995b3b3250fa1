"""The checkpoints of another run as they appear, for evaluation beside training."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runner.records import checkpoint_folder, journal, metrics

_PAUSE_S = 2.0


def new_checkpoints(run: Path, after: int, stop: Callable[[], bool]) -> Iterator[Path]:
    """Yield the newest checkpoint of `run` each time it is later than `after` and the last one.

    Ends once the run has ended and its last checkpoint was yielded, or `stop` returns true.
    """
    while not stop():
        ended = journal.state(run) in journal.ENDED  # read before the folder: it may end between
        folders = checkpoint_folder.listing(run / "checkpoints")
        is_new = bool(folders) and int(folders[-1].name) > after
        # `newest` computes checksums, so it is called for a new one only.
        newest = checkpoint_folder.newest(run / "checkpoints") if is_new else None
        if newest is not None and int(newest.name) > after:
            after = int(newest.name)
            yield newest
        elif ended:
            return
        else:
            time.sleep(_PAUSE_S)


def last_evaluated(run: Path) -> int:
    """Return the last step whose checkpoint the evaluating run `run` has validated, 0 if none."""
    return max((row["step"] for row in metrics.read(run) if "val_tokens" in row), default=0)
