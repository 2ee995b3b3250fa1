"""Files that processes and machines share: atomic writes, appended JSON lines, locks."""

import errno
import fcntl
import json
import os
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO, TextIOWrapper
from pathlib import Path
from typing import Any

from runner.machine.errors import DataError
from runner.machine.system_errors import reading, write_error
from runner.machine.typed_json import mismatch


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Append one JSON line in a single write.

    Raises:
        StorageError: the disk is full or read-only.
    """
    try:
        with open(file, "ab", buffering=0) as stream:
            write_line(stream, file, record)
    except OSError as error:
        raise write_error(file, error) from error


def write_line(stream: FileIO, file: Path, record: dict[str, Any]) -> None:
    """Append one JSON line to the open `stream` of `file`.

    Raises:
        OSError: the line did not fit; what was written of it is removed.
    """
    line = (json.dumps(record) + "\n").encode()
    if stream.write(line) != len(line):
        truncate_torn_line(file)  # the next line would become one with it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_atomically(file: Path, text: str) -> None:
    """Write `file` so that a reader sees either the new text or the old, never a part.

    Raises:
        StorageError: the disk is full or read-only.
    """
    unfinished = unfinished_name(file)
    try:
        with open(unfinished, "x", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(unfinished, file)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise write_error(file, error) from error


def unfinished_name(path: Path) -> Path:
    """Return a name beside `path`, new at each call, for what is renamed to `path` once complete.

    What is made under it gets the rights that the umask leaves; `tempfile` would make it readable
    by its owner alone, and so it would stay where a group shares the folder.
    """
    return path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def read_lines(file: Path, shape: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl file; a torn last line is left out.

    Args:
        shape: of each line, see `typed_json`.

    Raises:
        DataError: a line is not a JSON object of this shape; the message names file and line.
    """
    return read_lines_after(file, 0, shape)[0]


def read_lines_after(
    file: Path, offset: int, shape: Any = dict[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines after the byte `offset`, and the offset after the last of them.

    Args:
        shape: as in `read_lines`.

    Raises:
        DataError: a line is not a JSON object of this shape; the message names file and line.
    """
    if not file.exists():
        return [], offset
    with reading(file), open(file, "rb") as stream:
        stream.seek(offset)
        complete, newline, _ = stream.read().rpartition(b"\n")
    lines = []
    for index, text in enumerate(complete.splitlines()):
        if not text:
            continue
        line = _parsed(text)
        problem = mismatch(line, shape)
        if problem is not None:
            raise DataError(
                f"{file}, line {_number(file, offset) + index} {problem}; a failing disk or "
                "another program wrote it: delete the line, the others stand"
            )
        lines.append(line)
    return lines, offset + len(complete) + len(newline)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(file: Path, offset: int) -> int:
    with open(file, "rb") as stream:
        return stream.read(offset).count(b"\n") + 1


@contextmanager
def locked(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on `file`, waiting for other processes to release it.

    Args:
        shared: others may hold it too, if they share it.

    Raises:
        StorageError: the file cannot be made.
    """
    with _lockable(file) as stream:
        fcntl.flock(stream, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def try_locked(file: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `file` if no other process does; yield whether it is held.

    Raises:
        StorageError: the file cannot be made.
    """
    with _lockable(file) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def semaphore(folder: Path, places: int) -> Iterator[None]:
    """Hold one of `places` lock files in `folder`: take a free one, else wait for a random one.

    Raises:
        StorageError: the folder cannot be written.
    """
    numbers = random.sample(range(places), places)
    for number in numbers:
        with try_locked(folder / str(number)) as held:
            if held:
                yield
                return
    with locked(folder / str(numbers[0])):
        yield


def _lockable(file: Path) -> TextIOWrapper:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return open(file, "w")
    except OSError as error:
        raise write_error(file, error) from error


def truncate_torn_line(file: Path) -> None:
    """Cut off a last line that has no newline."""
    if not file.exists():
        return
    content = file.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete != len(content):
        os.truncate(file, complete)
