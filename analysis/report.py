"""What the JSON of every command holds: its numbers, and where they come from."""

import datetime
import importlib.metadata
import math
import sys
from typing import Any

import numpy as np

from analysis.source import Source


def origin(source: Source) -> dict[str, Any]:
    """Return the command, the input with its hash as it was read, and the version."""
    return {
        "command": "python -m analysis " + " ".join(sys.argv[1:]),
        "input": str(source.file),
        "input_sha256": source.sha256,
        "version": importlib.metadata.version("espalier"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def plain(value: Any) -> Any:
    """Return `value` in JSON's types; NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
