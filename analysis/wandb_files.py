"""The records in a .wandb file: a log of protocol buffers in blocks, as LevelDB writes it.

A file begins with 7 bytes of W&B's own. A record is cut into pieces that do not cross a block of
32,768 bytes: [crc32 uint32, length uint16, kind uint8], data; kind 1 whole, 2 first, 3 middle, 4
last. Fewer than 7 bytes at the end of a block are padding.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def read_records(file: Path) -> Iterator[Any]:
    """Yield the records of a file; a torn last one is left out.

    Raises:
        ValueError: it is no file of W&B.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415

    content = file.read_bytes()
    if content[:4] != b":W&B":
        raise ValueError(f"{file} is no file of W&B: it does not begin with :W&B")
    for data in _joined(content):
        yield Record.FromString(data)


def _joined(content: bytes) -> Iterator[bytes]:
    at, parts = _HEAD, b""
    while at + _HEAD <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + _HEAD : at + _HEAD + length]
        at += _HEAD + length
        if len(data) < length or not kind:
            return
        parts = data if kind in (_WHOLE, _FIRST) else parts + data
        if kind in (_WHOLE, _LAST):
            yield parts
