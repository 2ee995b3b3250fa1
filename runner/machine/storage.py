"""Files that several processes and machines share: whole writes, appended lines, locks, clear refusals."""

import errno
import fcntl
import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from runner.machine.errors import StorageError


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Append one JSON line in a single write.

    Raises:
        StorageError: the disk is full or read-only.
    """
    try:
        with open(file, "ab", buffering=0) as stream:
            stream.write((json.dumps(record) + "\n").encode())
    except OSError as error:
        raise refused(file, error) from error


def write_whole(file: Path, text: str) -> None:
    """Write `file` so that a reader sees all of it or what was there before.

    Raises:
        StorageError: the disk is full or read-only.
    """
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)
    except OSError as error:
        raise refused(file, error) from error


def refused(file: Path, error: OSError) -> StorageError:
    """Return the message for a write that the disk did not take."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
    return StorageError(
        f"{file} cannot be written: {reason}; free space or set root= to a folder you can write, then "
        "run the same command again"
    )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a .jsonl file; a torn last line is left out."""
    return read_further(file, 0)[0]


def read_further(file: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines that follow `offset`, and the offset after them."""
    if not file.exists():
        return [], offset
    with open(file, "rb") as stream:
        stream.seek(offset)
        whole, newline, _ = stream.read().rpartition(b"\n")
    lines = [json.loads(line) for line in whole.splitlines() if line]
    return lines, offset + len(whole) + len(newline)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold `file` against other processes, waiting for them.

    Raises:
        StorageError: the file cannot be made.
    """
    with _lockable(file) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def semaphore(folder: Path, places: int) -> Iterator[None]:
    """Hold one of `places` lock files in `folder`: take a free one, else wait for a random one.

    Raises:
        StorageError: the folder cannot be written.
    """
    numbers = random.sample(range(places), places)
    for number in numbers:
        with _lockable(folder / str(number)) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield
            return
    with locked(folder / str(numbers[0])):
        yield


def _lockable(file: Path) -> TextIOWrapper:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return open(file, "w")
    except OSError as error:
        raise refused(file, error) from error
