"""Sources of text: files of each format, the hub, folders; what is damaged is named."""

import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runner.data.corpus import documents, source_hash
from runner.data.sources import SourceConfig, row_source
from runner.data.sudoku import SudokuConfig
from runner.data.sum_lines import SumLinesConfig
from runner.data.tokenizers_config import TokenizerConfig
from runner.data.tokens import prepare, refuse_changed
from runner.data.tokens_config import DataConfig
from runner.machine.errors import DataError, NetworkError


def _jsonl(file: Path, *lines: str | bytes) -> SourceConfig:
    raw = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return SourceConfig(format="jsonl", path=str(file))


def test_jsonl_reads_one_document_a_line(tmp_path: Path) -> None:
    rows = ['\ufeff{"text": "one"}', "", '{"text": "two\u2028lines", "more": null}', '{"text": ""}']
    for name in ("a.jsonl", "a.jsonl.gz"):
        source = _jsonl(tmp_path / name, *rows)
        assert list(source.documents()) == ["one", "two\u2028lines"]
    with pytest.raises(DataError, match="line 1 has no field 'body'; it has text"):
        list(replace(source, field="body").documents())


def test_a_file_of_another_format_is_named_as_such(tmp_path: Path) -> None:
    for begins, says in (
        (gzip.compress(b"text"), "compressed by gzip, not text; name it .gz"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"PAR1", "is a parquet file"),
    ):
        (tmp_path / "a.jsonl").write_bytes(begins)
        for kind in ("jsonl", "text"):
            source = SourceConfig(format=kind, path=str(tmp_path / "a.jsonl"))
            with pytest.raises(DataError, match=says):
                list(source.documents())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": 5}', "'5' is int, not text"),
        ('{"text": ["a"]}', "is a list, not text"),
        ('{"text": {"a": "b"}}', "is an object, not text"),
        ('{"text": "a\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": "a\xff"}', "is not UTF-8 at byte 11"),
    ],
)
def test_a_row_that_is_no_text_is_refused_by_file_and_line(
    row: str | bytes, message: str, tmp_path: Path
) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        source = _jsonl(tmp_path / name, '{"text": "one"}', "", row, '{"text": "two"}')
        with pytest.raises(DataError, match=rf"{name}, line 3,?:? .*{message}"):
            list(source.documents())


def test_null_rows_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pandas as pd

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    rows = ['{"text": "one"}', '{"text": null}', '{"text": null}', '{"text": "two"}']
    pd.DataFrame({"text": ["one", None, None, "two"]}).to_parquet(tmp_path / "a.parquet")
    sources = [
        _jsonl(tmp_path / "a.jsonl", *rows),
        SourceConfig(format="parquet", path=str(tmp_path / "a.parquet")),
        SourceConfig(format="hub", path=str(tmp_path / "hub"), streaming=True),
    ]
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "hub")
    for source in sources:
        with pytest.warns(UserWarning, match="2 rows with text=null are skipped, 2 have text"):
            assert list(source.documents()) == ["one", "two"]
    pd.DataFrame({"text": ["one", 2.5]}, dtype=object).iloc[1:].to_parquet(tmp_path / "b.parquet")
    (tmp_path / "hub/a.jsonl").write_text('{"text": ["one"]}\n')
    numbers = SourceConfig(format="parquet", path=str(tmp_path / "b.parquet"))
    for source, message in (
        (numbers, r"b\.parquet, row 1: '2\.5' is float, not text"),
        (sources[2], r"dataset .*hub, row 1: .* is a list, not text"),
    ):
        with pytest.raises(DataError, match=message):
            list(source.documents())


def test_only_files_with_null_have_a_new_hash(tmp_path: Path) -> None:
    def revision_1(source: SourceConfig) -> str:
        content = hashlib.sha256(Path(str(source.path)).read_bytes()).hexdigest()
        return hashlib.sha256(f"\0{content}\ntext:None".encode()).hexdigest()[:32]

    for end in ("jsonl", "jsonl.gz"):
        said = json.dumps({"more": None, "text": json.dumps({"text": None})})
        without = _jsonl(tmp_path / f"a.{end}", '{"text": "one"}', said)
        assert without.content_hash() == revision_1(without)
        with_null = _jsonl(tmp_path / f"b.{end}", '{"text" :null}', '{"text": "one"}')
        assert with_null.content_hash() != revision_1(with_null)


def test_texts_that_follow_from_a_config_are_told_apart_by_it() -> None:
    """Runs and the cache of tokens would else take one source for another."""
    sums = SumLinesConfig(lines=20)
    others = (SudokuConfig(lines=20), SumLinesConfig(lines=21), SumLinesConfig(data_seed=1))
    hashes = [DataConfig(sources=(source,)).content_hash()[0] for source in (sums, *others)]
    assert len(set(hashes)) == 4
    assert all(hashes)
    assert source_hash(SumLinesConfig(lines=20, weight=3.0)) == hashes[0]
    with pytest.raises(DataError, match="has changed since"):
        refuse_changed(others[1], hashes[0])


def test_files_that_are_damaged_or_no_gzip_are_named(tmp_path: Path) -> None:
    whole = _jsonl(tmp_path / "a.jsonl.gz", *[json.dumps({"text": str(i)}) for i in range(9999)])
    cut = tmp_path / "cut.jsonl.gz"
    packed = Path(str(whole.path)).read_bytes()
    cut.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz, after line \d+, is damaged or cut off"):
        list(SourceConfig(format="jsonl", path=str(cut)).documents())
    cut.write_bytes(packed[:999] + bytes(99) + packed[1098:])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz.* is damaged or cut off"):
        list(SourceConfig(format="jsonl", path=str(cut)).documents())
    cut.write_text('{"text": "one"}')
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz is no gzip file"):
        list(SourceConfig(format="jsonl", path=str(cut)).documents())
    (tmp_path / "a.txt").write_bytes(b"one \xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 at byte 4"):
        list(SourceConfig(path=str(tmp_path / "a.txt")).documents())


def test_a_dataset_that_cannot_be_reached_is_a_matter_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # else it retries for 24 s
    data = DataConfig(sources=(SourceConfig(format="hub", path="no/such", revision="abc"),))
    with pytest.raises(NetworkError, match=r"dataset no/such cannot be fetched: .*check the net"):
        prepare(data, TokenizerConfig(), tmp_path)


class _Numbers:
    """A source of somebody else's that yields no text."""

    def documents(self) -> Iterator[int]:
        yield 5


def test_a_foreign_source_that_yields_no_text_is_named() -> None:
    with pytest.raises(DataError, match="_Numbers, document 1: '5' is int, not text"):
        list(documents(_Numbers()))


def test_the_standard_library_is_read_without_what_is_installed_into_it() -> None:
    source = SourceConfig(format="stdlib")
    files = {file.relative_to(source.files()[0].parent).as_posix() for file in source.files()}
    assert {"abc.py", "json/decoder.py"} <= files
    assert not [
        f for f in files if "site-packages" in f or f.startswith(("test/", "idlelib/idle_"))
    ]
    walked = []
    sys.addaudithook(lambda event, args: walked.append(args[0]) if event == "os.scandir" else None)
    source.files()
    assert not [folder for folder in walked if "site-packages" in str(folder)]


def test_hub_names_need_a_revision() -> None:
    with pytest.raises(ValueError, match="revision is missing"):
        SourceConfig(format="hub", path="some/dataset")


def test_parquet_reads_its_column(tmp_path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"body": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    source = SourceConfig(format="parquet", path=str(tmp_path / "a.parquet"), field="body")
    assert list(source.documents()) == ["one", "two"]
    with pytest.raises(DataError, match="no column 'text'; it has body"):
        list(SourceConfig(format="parquet", path=str(tmp_path / "a.parquet")).documents())
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(DataError, match="is not a parquet file"):
        list(SourceConfig(format="parquet", path=str(tmp_path / "b.parquet")).documents())


@pytest.mark.parametrize("form", ["jsonl", "parquet", "disk"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_loader_reads_local_folders(
    form: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    if form == "disk":
        datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    else:
        folder.mkdir()
        write = rows.to_json if form == "jsonl" else rows.to_parquet
        write(str(folder / f"train.{form}"))
    source = SourceConfig(format="hub", path=str(folder), streaming=streaming)
    assert list(source.documents()) == ["one", "two"]
    with pytest.raises(DataError, match="no field 'body'; it has text"):
        list(SourceConfig(format="hub", path=str(folder), field="body", streaming=True).documents())
    before = source.content_hash()
    extra = next(f for f in folder.rglob("*") if f.is_file())
    extra.write_bytes(extra.read_bytes() + b" ")
    assert SourceConfig(format="hub", path=str(folder)).content_hash() != before


def test_a_file_of_no_known_suffix_is_no_dataset_of_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "chats.txt"
    file.write_text("{}\n")
    with pytest.raises(ValueError, match=r"chats.txt has the suffix '.txt' and is no dataset"):
        row_source(str(file))
    with pytest.raises(ValueError, match="revision is missing for dataset 'org/name'"):
        row_source("org/name")
