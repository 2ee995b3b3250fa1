"""What the operating system, a decoder, gzip or the network raises, as an error of ours.

No other file explains an `errno`. `read_error` and `write_error` return what to raise; `reading`
raises it.
"""

import errno
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path

from runner.machine.errors import DataError, EspalierError, NetworkError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What writers in C and Rust raise has no errno; numpy tells only that less was written.
_FULL_TEXTS = ("No space left", "os error 28", "disk is full", " requested and ")
_CLIENTS = ("requests", "httpx", "httpcore", "urllib3", "aiohttp", "huggingface_hub")


def write_error(file: Path, error: Exception) -> EspalierError:
    """Return the exception for a failed write, with the file, the reason and the way out."""
    if isinstance(error, EspalierError):
        return error
    if _is_of_network(error):
        return _network_error(str(file), error)
    reason = "the disk is full" if is_full(error) else _reason(error)
    return StorageError(
        f"{file} cannot be written: {reason}; free space or set root= to a folder you can write"
    )


def read_error(source: Path | str, error: Exception) -> EspalierError:
    """Return the exception for a failed read of `source`, a file or a place in one."""
    if isinstance(error, EspalierError):
        return error
    if isinstance(error, UnicodeDecodeError):
        return DataError(
            f"{source} is not UTF-8 at byte {error.start}; "
            "convert it (iconv) or exclude it by pattern"
        )
    if isinstance(error, BadGzipFile) and str(error).startswith("Not a gzipped file"):
        return DataError(f"{source} is no gzip file ({error}); rename or compress it")
    if isinstance(error, (EOFError, zlib.error, BadGzipFile)):
        return DataError(
            f"{source} is damaged or cut off ({error}); fetch or compress the file again"
        )
    if _is_of_network(error):
        return _network_error(str(source), error)
    if is_full(error):  # a library keeps a copy of what it reads
        return StorageError(f"{source} cannot be read: the disk is full; free space")
    return DataError(f"{source} cannot be read: {_reason(error)}; check the path and its rights")


def system_error(error: OSError) -> EspalierError:
    """Return the exception for an `error` that no code nearer to its place has explained."""
    if isinstance(error, EspalierError):
        return error
    file = Path(str(error.filename)) if error.filename is not None else None
    if file is None and _is_of_network(error):
        return NetworkError(f"{_reason(error)}; check the network")
    if is_full(error) or error.errno == errno.EROFS:
        return write_error(file or Path.cwd(), error)
    return StorageError(f"{file or 'a file'}: {_reason(error)}; check the path and its rights")


@contextmanager
def reading(source: Path | str) -> Iterator[None]:
    """Raise what the body raises while it reads `source` as an error of ours that names it.

    Raises:
        DataError: it is missing, not UTF-8, damaged or may not be read.
        NetworkError: it lies on a server that cannot be reached or refuses it.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        if isinstance(error, EspalierError):
            raise
        raise read_error(source, error) from error


def is_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space or quota."""
    if getattr(error, "errno", None) is not None:
        return getattr(error, "errno", None) in _FULL
    return any(text in str(error) for text in _FULL_TEXTS)


def _is_of_network(error: BaseException | None) -> bool:
    """Return whether `error`, or what caused it, is of a connection or of a client of HTTP."""
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError)):
            return not isinstance(error, BrokenPipeError)
        if any(cls.__module__.partition(".")[0] in _CLIENTS for cls in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def _network_error(what: str, error: Exception) -> NetworkError:
    return NetworkError(
        f"{what} cannot be fetched: {_reason(error)}; check the network and the name, or give a "
        "local copy"
    )


def _reason(error: Exception) -> str:
    """Return one line: what the system says, or else what the library says."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(said).partition("\n")[0]
