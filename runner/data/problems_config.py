"""The configs of problems with solutions; see `runner/data/problems.py`."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.config import config, configs_of, execution
from runner.data.corpus import content_hash, source_hash
from runner.data.sources import Format, SourceConfig
from runner.machine.errors import DataError
from runner.machine.text_files import as_text

if TYPE_CHECKING:
    from runner.data.problems import ProblemCorpus


@dataclass(frozen=True)
class Problem:
    """A prompt and a solution of it, which a model learns or finds.

    Args:
        where: its place, for messages of errors.
        prompt: what the solution follows, not empty.
        solution: of a program to write: its tests.
    """

    where: str
    prompt: str
    solution: str


@config
class ProblemFile:
    """Problems in the rows of a file, or of an output of another run (input:NAME/FILE).

    Args:
        path: a .jsonl(.gz), .json (a list) or .parquet file.
        prompt, solution: names of the fields; GSM8K's are question and answer.
        form: the text of a prompt, in which {} is what its field holds.
    """

    path: str
    prompt: str = "prompt"
    solution: str = "solution"
    form: str = "{}"

    def __post_init__(self) -> None:
        if self.form.count("{}") != 1:
            raise ValueError(f"form={self.form!r} must have {{}} once, where the prompt stands")
        if Path(self.path).suffix in (".tsv", ".csv"):
            raise ValueError(
                f"path={self.path} is a table, and problems are the rows of a .jsonl(.gz), .json "
                "or .parquet file; texts with labels are data=sst2, whose sources are "
                "{_target_: runner.data.labelled_texts.LabelledFile, path: FILE, columns: NAMES}"
            )
        object.__setattr__(self, "path", str(self._rows().path))  # resolved: a job may move

    def content_hash(self) -> str:
        """Return the hash of the file's content and of what is made of it."""
        made = f"{content_hash(self._rows())}:{self.prompt}:{self.form}"
        return hashlib.sha256(made.encode()).hexdigest()[:32]

    def problems(self) -> Iterator[Problem]:
        """Yield the problems in order.

        Raises:
            DataError: a row lacks a field, or it holds no text; the message names file and line.
        """
        for where, row in self._rows().rows():
            texts = [self._text(row, field, where) for field in (self.prompt, self.solution)]
            yield Problem(where, self.form.replace("{}", texts[0]), texts[1])

    def _text(self, row: Any, field: str, where: str) -> str:
        if not isinstance(row, dict) or field not in row:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{where} has no {field!r}; it has {has}; name the fields by data.sources.0.prompt "
                "and data.sources.0.solution, the number being the source's"
            )
        text = as_text(row[field], f"{where}, {field}")
        if not text.strip():
            raise DataError(f"{where}: {field} is empty; mend or remove the row")
        return text

    def _rows(self) -> SourceConfig:
        forms: dict[str, Format] = {".json": "json", ".parquet": "parquet"}
        kind = forms.get(Path(self.path).suffix, "jsonl")
        return SourceConfig(format=kind, path=self.path, field=self.solution)


@config
class ProblemsConfig:
    """Problems, one to a sequence: the solution and its end are learnt, or found by task=grpo.

    Args:
        sources: where they are; each has `problems()`.
        val_fraction: share of the problems held out for validation, by the hash of the prompt.
        num_workers: loader processes (0: in the training process).
    """

    mask_documents: ClassVar[bool] = False

    sources: tuple[Any, ...] = configs_of(ProblemFile)
    val_fraction: float = 0.05
    num_workers: int = execution(0)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        for index, source in enumerate(self.sources):
            if not hasattr(source, "problems"):
                raise ValueError(
                    f"sources.{index}={source!r} holds no problems; give {{path: FILE}} with the "
                    "fields prompt and solution"
                )
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in (0, 1)")

    def content_hash(self) -> list[str]:
        """Return the content hash of each source, in order."""
        return [source_hash(source) for source in self.sources]

    def build(
        self, tokenizer: Any, cache: Path, hashes: list[str] | None = None
    ) -> "ProblemCorpus":
        """Return the corpus; nothing is cached."""
        from runner.data.problems import prepare  # noqa: PLC0415

        return prepare(self, tokenizer, hashes)
