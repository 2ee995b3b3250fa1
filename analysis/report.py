"""The JSON that every command writes: its numbers, and where they come from."""

import datetime
import hashlib
import importlib.metadata
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np


def origin(source: Path) -> dict[str, Any]:
    """Return the command, the input with its hash, and the version."""
    files = [source] if source.is_file() else [source / "cells.jsonl"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {
        "command": "python -m analysis " + " ".join(sys.argv[1:]),
        "input": str(source),
        "input_sha256": digest,
        "version": importlib.metadata.version("espalier"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_report(file: Path, source: Path, body: dict[str, Any]) -> None:
    """Write `body` with the origin of `source` to `file`; NaN and infinities become null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plain({"schema": 1} | origin(source) | body), indent=1) + "\n")


def plain(value: Any) -> Any:
    """Return `value` in JSON's types; NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
