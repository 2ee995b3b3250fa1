"""UTF-8 files that users give, plain or .gz; each error names the file and the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.machine.errors import DataError
from runner.machine.system_errors import read_error, reading

# By the first bytes: (format, way out).
_FORMATS = {
    b"\x1f\x8b": ("compressed by gzip", "name it .gz, or decompress it"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it"),
    b"BZh": ("compressed by bzip2", "decompress it"),
    b"\xfd7zXZ": ("compressed by xz", "decompress it"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("a parquet file", "read it as one (data=parquet)"),
}


def read_text(file: Path, *, errors: str = "strict") -> str:
    """Return the text of a UTF-8 file.

    Args:
        errors: see `open`; "replace" reads bytes that are no UTF-8 as U+FFFD.

    Raises:
        DataError: it is missing, not UTF-8 or may not be read.
    """
    with reading(file):
        if errors == "strict":
            _refuse_binary(file)
        return file.read_text(encoding="utf-8", errors=errors)


def read_json(file: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        DataError: it is missing, not UTF-8 or not JSON.
    """
    return _parsed(read_text(file).removeprefix("\ufeff"), str(file))


def lines(file: Path) -> Iterator[tuple[int, str]]:
    r"""Yield (number from 1, line) of a UTF-8 file, plain or .gz, without a byte order mark.

    Lines end at \n, \r\n or \r; U+2028 and its like are part of a line.

    Raises:
        DataError: the file is missing or damaged, or a line is not UTF-8.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        if file.suffix != ".gz":
            _refuse_binary(file)
        # Decoding strictly would fail for a whole buffer, whose lines have no number yet.
        with opener(file, "rt", encoding="utf-8-sig", errors="surrogateescape") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isascii():
                    line.encode("utf-8", "surrogateescape").decode()
                yield number, line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise read_error(_place(file, number, error), error) from None


def _refuse_binary(file: Path) -> None:
    """Refuse a file whose first bytes are those of another format than text.

    Raises:
        DataError: it is compressed, an archive or a table; the message says which.
    """
    with open(file, "rb") as stream:
        begins = stream.read(max(map(len, _FORMATS)))
    for magic, (format_name, way_out) in _FORMATS.items():
        if begins.startswith(magic):
            raise DataError(f"{file} is {format_name}, not text; {way_out}")


def _place(file: Path, number: int, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{file}, line {number},"
    return f"{file}, after line {number}," if number else str(file)


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("FILE, line N", value) of each line of a JSON-lines file that is not blank.

    Raises:
        DataError: see `lines`; or a line is not JSON.
    """
    for number, line in lines(file):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON ({reason}); mend or remove it") from None


def as_text(value: Any, where: str) -> str:
    """Return `value`, which must be text that UTF-8 can hold.

    Args:
        where: the place of the value, for messages.

    Raises:
        DataError: it is something else than text, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        kind = {dict: "an object", list: "a list", bytes: "bytes", type(None): "null"}
        raise DataError(
            f"{where}: {str(value)[:40]!r} is {kind.get(type(value), type(value).__name__)}, not "
            "text; name another field, or mend or remove it"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {value[error.start]!a} at character {error.start} is no character but "
                "half of a surrogate pair, or a byte that is not UTF-8; mend or remove it"
            ) from None
    return value
