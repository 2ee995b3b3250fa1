"""Sources of documents: files, folders, the standard library, Hugging Face datasets.

A source yields documents (str) in a fixed order. A cell's fingerprint contains the hash of its
content, never its path.
"""

import gzip
import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Literal, cast

from models.config import config
from runner.machine.errors import DataError
from runner.machine.memo import Memo
from runner.machine.system_errors import read_error, reading
from runner.machine.text_files import as_text, json_lines, read_json, read_text

# Revision 1 read null as the word "None". A file without null keeps its hash.
_NULLS_SKIPPED = b":2"
_NULLS = Memo("nulls")  # whether a row has null, by "sha256 field"

Format = Literal["text", "jsonl", "json", "parquet", "stdlib", "hub"]


@config
class SourceConfig:
    """One source of text.

    Args:
        format: text (file or folder, a document per file), jsonl (plain or .gz, a document per
            line), json (a list of objects), parquet, stdlib (the running Python's standard
            library), hub (a Hugging Face dataset by name, or a local folder in any form that
            `datasets` reads).
        path: file, folder (files sorted) or dataset name; `~` and relative paths are resolved.
        field: column that holds the text (jsonl, json, parquet, hub).
        pattern: glob pattern of the files to read in a folder.
        subset, revision, streaming, hub_split: of a Hugging Face dataset; revision must be pinned
            unless the dataset is a local folder, whose files are hashed.
        weight: share of the training samples, relative to the other sources.
        max_documents: stop after this number of documents (to stream a part of a large set).
    """

    format: Format = "text"
    path: str | None = None
    field: str = "text"
    pattern: str = "*"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    hub_split: str = "train"
    weight: float = 1.0
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if self.format != "stdlib" and not self.path:
            raise ValueError(
                f"path is missing for format={self.format}; give data.sources.0.path=PATH"
            )
        if self.format == "hub" and not self.revision and not self._is_local():
            if self.path and (file := Path(self.path).expanduser()).is_file():
                raise ValueError(
                    f"path={self.path} has the suffix {file.suffix!r} and is no dataset; rows are "
                    "read from .jsonl, .jsonl.gz, .json (a list) and .parquet: convert it"
                )
            raise ValueError(
                f"revision is missing for dataset {self.path!r}: pin it to a commit, "
                "data.sources.0.revision=COMMIT, else the text can change under a finished run"
            )
        if self.path and not self._from_input and (self.format != "hub" or self._is_local()):
            # A job may start in another directory.
            object.__setattr__(self, "path", str(Path(self.path).expanduser().resolve()))
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; drop the source instead")

    def documents(self) -> Iterator[str]:
        """Yield the documents in order; rows without text (null) are skipped, with a warning.

        Raises:
            DataError: a file is missing, empty or damaged, or a row is not UTF-8, not JSON or holds
                something else than text; the message gives file and line.
            NetworkError: the dataset cannot be fetched.
        """
        count = nulls = 0
        for where, value in self._read():
            if value is None:
                nulls += 1
                continue
            text = as_text(value, where)
            if not text:
                continue
            count += 1
            yield text
            if count == self.max_documents:
                break
        if nulls:
            warnings.warn(
                f"{self.path}: {nulls} rows with {self.field}=null are skipped, {count} have text",
                stacklevel=1,
            )
        if not count:
            raise DataError(
                f"{self.path or self.format} holds no text; check the path, "
                f"field={self.field!r} and pattern={self.pattern!r}"
            )

    def content_hash(self) -> str:
        """Return the hash of the files' content, or of the pinned revision of a hub dataset."""
        digest = hashlib.sha256()
        if self._from_input:
            # The file may not exist yet; the run that makes it is in the fingerprint.
            digest.update(str(self.path).encode())
        elif self.format == "hub" and not self._is_local():
            digest.update(f"{self.path}/{self.subset}@{self.revision}:{self.hub_split}".encode())
        else:
            root = self._root()
            for file in self.files():
                name = file.relative_to(root).as_posix() if file != root else "file"
                stat = file.stat()
                content = _file_hash(str(file), stat.st_size, stat.st_mtime_ns)
                digest.update(f"{name if self.format == 'stdlib' else ''}\0{content}\n".encode())
        if self.format == "hub":
            digest.update(f"{self.subset}:{self.hub_split}".encode())
        columns = self.format in ("jsonl", "json", "parquet", "hub")
        digest.update(f"{self.field if columns else ''}:{self.max_documents}".encode())
        if self.format == "jsonl" and not self._from_input and self._has_null():
            digest.update(_NULLS_SKIPPED)
        return digest.hexdigest()[:32]

    def _has_null(self) -> bool:
        found = any(_has_null(file, self.field) for file in self.files())
        _NULLS.save()
        return found

    def files(self) -> list[Path]:
        """Return the files in reading order.

        Raises:
            DataError: the path does not exist, or no file of the folder matches `pattern`.
        """
        root = self._root()
        if not root.exists():
            raise DataError(
                f"data file {root} does not exist; check the path "
                f"(relative paths start at {Path.cwd()})"
            )
        if root.is_file():
            return [root]
        if self.format == "stdlib":
            files = list(_library_files(root))
        else:
            files = [f for f in root.rglob(self.pattern) if f.is_file()]
        if not files:
            raise DataError(f"folder {root} has no file matching pattern={self.pattern!r}")
        return sorted(files)

    def _root(self) -> Path:
        if self.format == "stdlib":
            return Path(sysconfig.get_paths()["stdlib"])
        return Path(str(self.path))

    @property
    def _from_input(self) -> bool:
        return str(self.path).startswith("input:")

    def _is_local(self) -> bool:
        return Path(str(self.path)).expanduser().is_dir()

    def _read(self) -> Iterator[tuple[str, Any]]:
        """Yield (place for messages, value of the field) of each document or row."""
        if self.format == "hub":
            yield from self._read_hub()
            return
        for file in self.files():
            if self.format == "text":
                yield str(file), read_text(file)
            elif self.format == "stdlib":
                yield str(file), read_text(file, errors="replace")
            elif self.format == "parquet":
                yield from _read_parquet(file, self.field)
            else:
                for where, row in _json_rows(file):
                    yield where, _value(row, self.field, where)

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Yield (place for messages, row) of a jsonl, json, parquet or hub source.

        Raises:
            DataError: see `documents`.
        """
        if self.format == "hub":
            for number, row in enumerate(self._hub_rows(), start=1):
                yield f"dataset {self.path}, row {number}", row
            return
        for file in self.files():
            yield from _read_parquet(file) if self.format == "parquet" else _json_rows(file)

    def _read_hub(self) -> Iterator[tuple[str, Any]]:
        for where, row in self.rows():
            if self.field not in row:
                raise DataError(
                    f"dataset {self.path} has no field {self.field!r}; it has {', '.join(row)}"
                )
            yield where, row[self.field]

    def _hub_rows(self) -> Iterator[dict[str, Any]]:
        import datasets  # noqa: PLC0415  (0.9 s)

        name = f"dataset {self.path}"
        path = str(self._root()) if self._is_local() else self.path
        try:
            with reading(name):
                if (Path(str(path)) / "dataset_dict.json").exists():
                    yield from datasets.load_from_disk(path)[self.hub_split]
                else:
                    yield from datasets.load_dataset(
                        path,
                        self.subset,
                        split=self.hub_split,
                        revision=self.revision,
                        streaming=self.streaming,
                    )
        except (datasets.exceptions.DatasetsError, ValueError) as error:
            raise read_error(name, error) from error


# Folders of the standard library that hold no source of it: installed, tests, generated.
_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def row_source(path: str, **given: Any) -> SourceConfig:
    """Return the source of the rows at `path`, whose format is seen from its name.

    Args:
        path: a .jsonl(.gz), .json (a list) or .parquet file, a folder of them, a dataset's name, or
            an output file of an input.
        **given: further arguments of `SourceConfig`.
    """
    there, kind = Path(path).expanduser(), "hub"
    if path.startswith("input:") or there.suffix in (".jsonl", ".gz"):
        kind = "jsonl"
    elif there.suffix in (".json", ".parquet"):
        kind = there.suffix.removeprefix(".")
    elif there.is_dir():
        suffixes = {file.suffix for file in there.rglob(given.get("pattern", "*"))}
        local = [form for form in ("jsonl", "json") if f".{form}" in suffixes]
        kind = local[0] if local and not (there / "dataset_dict.json").exists() else "hub"
    return SourceConfig(format=cast(Format, kind), path=path, **given)


def _library_files(root: Path) -> Iterator[Path]:
    """Yield the .py files of the library at `root`; other folders are not walked."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NO_LIBRARY]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


@lru_cache(maxsize=100_000)
def _file_hash(file: str, size: int, mtime_ns: int) -> str:
    with reading(file), open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unpacked(file: Path, *, overlap: int) -> Iterator[bytes]:
    """Yield what a .gz file holds in parts, each beginning with the end of the one before."""
    with gzip.open(file, "rb") as stream:
        end = b""
        while part := stream.read(1 << 22):
            yield end + part
            end = part[-overlap:]


def _has_null(file: Path, field: str) -> bool:
    """Return whether a row of a .jsonl(.gz) file has null in `field`.

    A file that was looked through before, by this process or another, is not unpacked again.
    """
    stat = file.stat()
    key = f"{_file_hash(str(file), stat.st_size, stat.st_mtime_ns)} {field}"
    if key not in _NULLS.entries:
        _NULLS.entries[key] = _look_for_null(file, field)
    return bool(_NULLS.entries[key])


def _look_for_null(file: Path, field: str) -> bool:
    """Within a text the quotes of a key are escaped: only a key itself is found."""
    names = {json.dumps(field).encode(), json.dumps(field, ensure_ascii=False).encode()}
    null = re.compile(b"(?:" + b"|".join(map(re.escape, names)) + rb")\s*:\s*null")
    with reading(file):
        if file.suffix == ".gz":
            return any(null.search(part) for part in _unpacked(file, overlap=256))
        with open(file, "rb") as stream:
            if not file.stat().st_size:  # which cannot be mapped
                return False
            return null.search(mmap(stream.fileno(), 0, access=ACCESS_READ)) is not None


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a .jsonl(.gz) file, or of a .json file that holds a list."""
    if file.suffix != ".json":
        yield from json_lines(file)
        return
    rows = read_json(file)
    if not isinstance(rows, list):
        raise DataError(f"{file} holds a {type(rows).__name__}, not a list of rows; mend it")
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))


def _value(row: Any, field: str, where: str) -> Any:
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where} has no field {field!r}; it has {has}; give its name as "
            "data.sources.0.field, the number being the source's"
        )
    return row[field]


def _read_parquet(file: Path, field: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (place, value of the column `field`, or the row as a dict) of a parquet file."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    number = 0
    try:
        with reading(file):
            table = pq.ParquetFile(file)
            if field is not None and field not in table.schema_arrow.names:
                raise DataError(
                    f"{file} has no column {field!r}; it has {', '.join(table.schema_arrow.names)}"
                )
            for batch in table.iter_batches(columns=None if field is None else [field]):
                for value in (batch if field is None else batch.column(0)).to_pylist():
                    number += 1
                    yield f"{file}, row {number}", value
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a parquet file ({error}); mend or remove it") from None
