"""What a full disk, a server out of reach and a damaged file raise is said as what it is."""

import errno
import gzip
from pathlib import Path

import numpy as np
import pytest

from runner.machine.errors import DataError, EspalierError, NetworkError, StorageError
from runner.machine.system_errors import read_error, system_error, write_error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["space", "quota", "safetensors"],
)
def test_a_full_disk_is_called_so(error: Exception) -> None:
    told = write_error(Path("a.bin"), error)
    assert isinstance(told, StorageError)
    assert str(told).startswith("a.bin cannot be written: the disk is full; free space")
    if isinstance(error, OSError):
        assert "the disk is full" in str(system_error(error))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
def test_numpy_does_not_say_why_it_wrote_less() -> None:
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="written") as caught:
        np.zeros(10**6).tofile(full)
    assert caught.value.errno is None
    assert "the disk is full" in str(write_error(Path("a.bin"), caught.value))


@pytest.mark.parametrize("tell", [read_error, write_error])
@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach 'x'"), TimeoutError(), ConnectionResetError(104, "x")]
)
def test_a_server_out_of_reach_is_no_matter_of_the_disk(error: OSError, tell: object) -> None:
    for told in (tell(Path("a"), error), system_error(error)):  # type: ignore[operator]
        assert isinstance(told, NetworkError)
        assert "check the network" in str(told)
        assert "None" not in str(told)
        assert "space" not in str(told)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "Permission denied"),
        (OSError("only words"), "only words"),
        (OSError(), "OSError"),
    ],
)
def test_every_other_error_gives_its_reason(error: OSError, message: str) -> None:
    told: list[EspalierError] = [read_error("a", error), write_error(Path("a"), error)]
    assert isinstance(told[0], DataError)
    for one in (*told, system_error(error)):
        assert message in str(one)
        assert "None" not in str(one)
    assert read_error("a", told[0]) is told[0]  # what is ours already stays as it is


def test_gzip_and_utf_8_are_named() -> None:
    packed = gzip.compress(b"text")
    wrong_sum = packed[:-8] + b"0000" + packed[-4:]
    for raw, message in (
        (b"no", "is no gzip file"),
        (packed[:-9], "damaged"),
        (wrong_sum, "damaged"),
    ):
        with pytest.raises((OSError, EOFError)) as caught:
            gzip.decompress(raw)
        assert message in str(read_error("a.gz", caught.value))
    with pytest.raises(UnicodeDecodeError) as wrong:
        b"one \xff".decode()
    assert "a.txt is not UTF-8 at byte 4" in str(read_error("a.txt", wrong.value))
