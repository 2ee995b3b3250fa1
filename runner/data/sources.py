"""Sources of documents: files, folders, the standard library, Hugging Face datasets.

A source yields documents (str) in a fixed order. A cell's fingerprint contains the hash of its
content, never its path.
"""

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from models.config import config
from runner.machine.errors import DataError

Format = Literal["text", "jsonl", "parquet", "stdlib", "hub"]


@config
class SourceConfig:
    """One source of text.

    Args:
        format: text (file or folder, a document per file), jsonl (plain or .gz, a document per
            line), parquet, stdlib (the running Python's standard library), hub (a Hugging Face
            dataset by name, or a local folder in any form that `datasets` reads).
        path: file, folder (files sorted) or dataset name; `~` and relative paths are resolved.
        field: column that holds the text (jsonl, parquet, hub).
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
                f"data path is missing for format={self.format}; "
                "give data.sources[..].path (or data.path)"
            )
        if self.format == "hub" and not self.revision and not self._is_local():
            raise ValueError(
                f"revision is missing for dataset {self.path!r}: pin it to a commit, else the text "
                "can change under a finished run"
            )
        if self.path and not self._from_input and (self.format != "hub" or self._is_local()):
            # A job may start in another directory.
            object.__setattr__(self, "path", str(Path(self.path).expanduser().resolve()))
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be positive; drop the source instead")

    def documents(self) -> Iterator[str]:
        """Yield the documents in order.

        Raises:
            DataError: a file is missing, empty, not UTF-8 or not JSON (with file and line).
        """
        count = 0
        for text in self._read():
            if not text:
                continue
            count += 1
            yield text
            if count == self.max_documents:
                return
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
        columns = self.format in ("jsonl", "parquet", "hub")
        digest.update(f"{self.field if columns else ''}:{self.max_documents}".encode())
        return digest.hexdigest()[:32]

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
            files = [f for f in root.rglob("*.py") if _is_library(f.relative_to(root))]
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

    def _read(self) -> Iterator[str]:
        if self.format == "hub":
            yield from self._read_hub()
            return
        for file in self.files():
            if self.format in ("text", "stdlib"):
                yield _read_text(file, lenient=self.format == "stdlib")
            elif self.format == "jsonl":
                yield from _read_jsonl(file, self.field)
            else:
                yield from _read_parquet(file, self.field)

    def _read_hub(self) -> Iterator[str]:
        import datasets  # noqa: PLC0415  (0.9 s)

        path = str(self._root()) if self._is_local() else self.path
        if (Path(str(path)) / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(path)[self.hub_split]
        else:
            rows = datasets.load_dataset(
                path,
                self.subset,
                split=self.hub_split,
                revision=self.revision,
                streaming=self.streaming,
            )
        for row in rows:
            if self.field not in row:
                raise DataError(
                    f"dataset {self.path} has no field {self.field!r}; it has {', '.join(row)}"
                )
            yield row[self.field]


def _is_library(relative: Path) -> bool:
    """Return whether a file is of the library itself, not installed, a test or generated."""
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return not skip.intersection(relative.parts)


@lru_cache(maxsize=100_000)
def _file_hash(file: str, size: int, mtime_ns: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_text(file: Path, *, lenient: bool) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace" if lenient else "strict")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 at byte {error.start}; "
            "convert it (iconv) or exclude it by pattern"
        ) from None


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}, line {number} is not JSON ({error.msg}); mend or remove the line"
                ) from None
            if not isinstance(row, dict) or field not in row:
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"{file}, line {number} has no field {field!r}; it has {has}; set data field"
                )
            yield str(row[field])


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is not a parquet file ({error}); mend or remove it") from None
    if field not in table.schema_arrow.names:
        raise DataError(
            f"{file} has no column {field!r}; it has {', '.join(table.schema_arrow.names)}"
        )
    for batch in table.iter_batches(columns=[field]):
        yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)
