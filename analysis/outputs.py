"""The files of one command: none is an input, none replaces a file that the command did not make.

They are written aside and put in place together. A record among them, JSON, lists the hash of each;
a file that exists already is replaced only if that record, left by the same command, lists it as it
now is.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WAY_OUT = "choose another --out"


class OutputError(ValueError):
    """A file may not or cannot be written; the message names it and the way out."""


@dataclass(frozen=True)
class Outputs:
    """Where one command writes.

    Args:
        record: the JSON file that lists all others; they lie in its folder or below.
        made_by: the command, as it is typed.
        inputs: the files that it reads.
    """

    record: Path
    made_by: str
    inputs: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the record, in which all paths of files are relative."""
        return self.record.parent

    def check(self, names: Iterable[str]) -> None:
        """Refuse what may not be written: the record and the files `names`.

        Raises:
            OutputError: a file is an input, or another file of this command, or exists and was not
                made by it; or the folder cannot be written.
        """
        listed, seen = self._listed(), set[str]()
        for name in [self.record.name, *names]:
            file = self.folder / name
            if name in seen:
                raise OutputError(f"{file} would be two files of {self.made_by}; {_WAY_OUT}")
            seen.add(name)
            for source in self.inputs:
                if file.exists() and source.exists() and file.samefile(source):
                    raise OutputError(
                        f"{file} is an input of {self.made_by} and would be overwritten; {_WAY_OUT}"
                    )
            if os.path.lexists(file) and not (
                file.is_file() and (file == self.record or listed.get(name) == sha256(file))
            ):
                raise OutputError(
                    f"{file} exists and was not made by {self.made_by}, or has changed since; "
                    f"move it away, or {_WAY_OUT}"
                )
        if self.record.exists() and not self._record():
            raise OutputError(
                f"{self.record} exists and was not made by {self.made_by}; move it away, or "
                f"{_WAY_OUT}"
            )
        check_folder(self.folder)

    @contextmanager
    def staged(self, facts: dict[str, Any]) -> Iterator[Path]:
        """Yield a folder to write to; what lies in it at the end is put in place.

        The record, `facts` with the hashes of the files, is written with them.

        Raises:
            OutputError: as in `check`; or the files cannot be written.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".writing-", dir=self.folder)
        with scratch as name, self._writing(name):
            staged = Path(name)
            yield staged
            files = sorted(file for file in staged.rglob("*") if file.is_file())
            names = [str(file.relative_to(staged)) for file in files]
            self.check(names)
            made = dict(zip(names, map(sha256, files), strict=True))
            earlier = {k: v for k, v in self._listed().items() if k not in made}
            record = facts | {"made_by": self.made_by, "files": made, "earlier": earlier}
            text = json.dumps(record, indent=1, allow_nan=False)
            (staged / self.record.name).write_text(f"{text}\n")
            for name in [self.record.name, *names]:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged / name, self.folder / name)

    @contextmanager
    def _writing(self, staged: str = "") -> Iterator[None]:
        """Explain what the system refuses to write in the folder, nothing that it refuses to read.

        Args:
            staged: the only files that are written by then.
        """
        try:
            yield
        except OSError as error:
            if not str(error.filename or staged).startswith(staged):
                raise
            raise OutputError(
                f"{self.folder} cannot be written: {error.strerror or error}; choose another "
                "folder by --out"
            ) from error

    def made(self) -> list[Path]:
        """Return the files that the latest call made, [] before the first."""
        return [self.folder / name for name in self._record().get("files", {})]

    def _record(self) -> dict[str, Any]:
        """Return the record that an earlier call of the command left, {} if there is none."""
        try:
            record = json.loads(self.record.read_bytes())
        except (OSError, ValueError):
            return {}
        ours = isinstance(record, dict) and record.get("made_by") == self.made_by
        lists = [record.get(key, {}) for key in ("files", "earlier")] if ours else []
        return record if lists and all(isinstance(files, dict) for files in lists) else {}

    def _listed(self) -> dict[str, str]:
        """Return the hashes of the files that earlier calls made."""
        record = self._record()
        listed: dict[str, str] = record.get("earlier", {}) | record.get("files", {})
        return listed


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, or made where it does not exist.

    Raises:
        OutputError: names the folder, or the part of its path that is in the way.
    """
    there = next(part for part in [folder, *folder.absolute().parents] if os.path.lexists(part))
    if not there.is_dir():
        raise OutputError(f"{there} is not a folder; {_WAY_OUT}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{there} cannot be written; choose a folder that can by --out")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
