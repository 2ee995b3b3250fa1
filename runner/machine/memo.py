"""What takes long to find out and stays true, kept for later processes in the temporary folder."""

import json
import os
import tempfile
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.machine import storage
from runner.machine.errors import StorageError


class Memo:
    """A dictionary that the user's later processes find again; to lose it only costs time.

    Args:
        name: of its file.
    """

    def __init__(self, name: str) -> None:
        self._file = Path(tempfile.gettempdir(), f"espalier-{name}-{os.getuid()}.json")
        self._num_saved = 0

    @cached_property
    def entries(self) -> dict[str, Any]:
        """The dictionary as the file has it, with what this process has added."""
        entries: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(self._file.read_bytes())
            entries = found if isinstance(found, dict) else {}
        self._num_saved = len(entries)
        return entries

    def save(self) -> None:
        """Write the file if entries were added."""
        if len(self.entries) > self._num_saved:
            with suppress(StorageError):
                storage.write_atomically(self._file, json.dumps(self.entries))
            self._num_saved = len(self.entries)
