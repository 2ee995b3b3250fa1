"""Texts with one of a few labels, as problems whose solution is the label in words.

A model learns the words by data=problems, and is asked which of them is likeliest by
`runner/evaluate/labels.py`: fine-tuning and prompting are measured on the same lines.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import config, execution
from runner.data.corpus import content_hash
from runner.data.problems_config import Problem
from runner.data.sources import SourceConfig, row_source
from runner.machine.errors import DataError
from runner.machine.text_files import as_text, lines

_SUFFIXES = (".tsv", ".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True)
class LabelledText:
    """A text and its label.

    Args:
        where: its place, for messages.
        label: its place among the labels of the file.
    """

    where: str
    text: str
    label: int


@config
class LabelledFile:
    r"""Labelled texts of a file, a problem for each.

    Args:
        path: a .tsv file (a text to a line, nothing is quoted), .jsonl(.gz), .json (a list) or
            .parquet.
        columns: names of the columns of a .tsv file (none: the first line has them).
        text, label: names of the fields.
        values: what the label field holds, in the order of `words`.
        words: what a model writes for each label; a space that begins a word is part of it.
        form: what a model reads, in which {} is the text.
    """

    path: str = execution()
    columns: tuple[str, ...] = ()
    text: str = "sentence"
    label: str = "label"
    values: tuple[str, ...] = ("0", "1")
    words: tuple[str, ...] = (" negative", " positive")
    form: str = "Review: {}\nSentiment:"

    def __post_init__(self) -> None:
        if not self.path.endswith(_SUFFIXES):
            raise ValueError(f"path={self.path!r} must end in {', '.join(_SUFFIXES)}")
        if self.form.count("{}") != 1:
            raise ValueError(f"form={self.form!r} must have {{}} once, where the text stands")
        if len(self.values) != len(self.words) or len(self.words) < 2:
            raise ValueError(
                f"values={list(self.values)} and words={list(self.words)} must be equally many, "
                "at least 2: a word for each label"
            )
        for name in ("values", "words"):
            if len(set(getattr(self, name))) < len(self.words) or "" in getattr(self, name):
                raise ValueError(f"{name}={list(getattr(self, name))} must differ, none empty")
        if self.columns and not {self.text, self.label} <= set(self.columns):
            raise ValueError(
                f"columns={list(self.columns)} lacks text={self.text!r} or label={self.label!r}"
            )
        object.__setattr__(self, "path", str(self._source().path))  # resolved: a job may move

    def content_hash(self) -> str:
        """Return the hash of the file's content and of what is made of it.

        Raises:
            DataError: there is no such file.
        """
        made = (content_hash(self._source()), self.columns, self.text, self.label, self.form)
        return hashlib.sha256(repr((*made, self.values, self.words)).encode()).hexdigest()[:32]

    def texts(self) -> Iterator[LabelledText]:
        """Yield the texts in order.

        Raises:
            DataError: there is none, a line lacks a field, its text is empty, or its label is none
                of `values`; the message names file and line.
        """
        found = False
        for where, row in self._rows():
            for field in (self.text, self.label):
                if not isinstance(row, dict) or field not in row:
                    has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise DataError(
                        f"{where} has no {field!r}; it has {has}; name the fields by text and "
                        "label, or the columns by columns"
                    )
            text, given = as_text(row[self.text], f"{where}, {self.text}"), row[self.label]
            if not text.strip():
                raise DataError(f"{where}: {self.text} is empty; mend or remove the row")
            if given is None or str(given) not in self.values:
                raise DataError(
                    f"{where}: {self.label}={given!r} is none of the labels "
                    f"{', '.join(self.values)}; mend the row, or name it in values and words"
                )
            found = True
            yield LabelledText(where, text, self.values.index(str(given)))
        if not found:
            raise DataError(f"{self.path} holds no text; give another file")

    def prompt(self, text: LabelledText) -> str:
        """Return what a model reads of a text."""
        return self.form.replace("{}", text.text)

    def problems(self) -> Iterator[Problem]:
        """Yield each text as a problem; for errors see `texts`."""
        for text in self.texts():
            yield Problem(text.where, self.prompt(text), self.words[text.label])

    def _rows(self) -> Iterator[tuple[str, Any]]:
        if not self.path.endswith(".tsv"):
            yield from self._source().rows()
            return
        names = self.columns
        for number, line in lines(Path(self.path)):
            where, cells = f"{self.path}, line {number}", line.rstrip("\r\n").split("\t")
            if not names:
                names = tuple(cells)
            elif len(cells) != len(names):
                raise DataError(
                    f"{where} has {len(cells)} columns, not {len(names)} ({', '.join(names)}); "
                    "mend the line"
                )
            else:
                yield where, dict(zip(names, cells, strict=True))

    def _source(self) -> SourceConfig:
        """Return the file as a source; of a .tsv file it knows place and content, not the rows."""
        if self.path.endswith(".tsv"):
            return SourceConfig(format="text", path=self.path)
        return row_source(self.path, field=self.text)
