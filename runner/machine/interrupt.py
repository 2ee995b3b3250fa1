"""Ctrl-C while modules are imported and configs composed: one line, at once."""

import os
import signal
from types import FrameType

INTERRUPTED = 130  # exit code after Ctrl-C


def answer_at_once() -> None:
    """Make Ctrl-C end the process with one line, until `leave_to_python`.

    An exception would cross the imports and Hydra, which print it with a traceback; nothing is
    half-written as long as no cell is frozen.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _end)


def leave_to_python() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again, where files are written and processes run."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
