import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.config import revision
from runner.data.corpus import documents, end_ids, loads, prompt_ids, source_hash
from runner.data.order import TrainingSamples, validation_batches
from runner.data.pretrained import with_pretrained
from runner.data.sources import SourceConfig
from runner.data.sudoku import SudokuConfig
from runner.data.sum_lines import SumLinesConfig
from runner.data.tokenizers import ByteTokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.data.tokens import TokenFile, prepare, refuse_changed
from runner.data.tokens_config import DataConfig
from runner.machine.errors import DataError, NetworkError
from tests.folders import llama3

SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tinyshakespeare/input.txt"


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


def test_empty_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text"):
        list(SourceConfig(path=str(tmp_path / "empty.txt")).documents())


def test_hub_names_need_a_revision() -> None:
    with pytest.raises(ValueError, match="revision is missing"):
        SourceConfig(format="hub", path="some/dataset")


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "unigram"])
def test_tokenizers_round_trip_and_count_bytes(kind: str) -> None:
    texts = ["The cat sat on the mat. Ünïcode!\n" * 20, "Another line, another day.\n" * 20]
    size = 300 if kind in ("bpe", "unigram") else None
    built = TokenizerConfig(kind=kind, vocab_size=size).build(texts)  # type: ignore[arg-type]
    for tokenizer in (built, loads(built.dumps())):
        ids = tokenizer.encode(texts[0])
        assert tokenizer.decode(ids.tolist()) == texts[0]
        assert tokenizer.bytes_per_id()[ids].sum() == len(texts[0].encode())
        assert tokenizer.bytes_per_id()[tokenizer.eos] == 0


def _files(sizes: list[int]) -> list[TokenFile]:
    return [TokenFile(np.arange(n) + 10_000 * i, np.array([0])) for i, n in enumerate(sizes)]


def test_an_epoch_visits_every_window_once() -> None:
    samples = TrainingSamples(_files([1001]), [1.0], seq=10, seed=3, eos=0)
    starts = [int(samples[i]["tokens"][0]) for i in range(99)]
    assert len(set(starts)) == 99
    assert len({s % 10 for s in starts}) == 1
    other = [int(samples[i]["tokens"][0]) for i in range(99, 198)]
    assert len(set(other)) == 99
    assert starts != other


def test_sources_are_mixed_by_weight_and_sample_i_is_always_the_same() -> None:
    files, weights = _files([5000, 5000]), [3.0, 1.0]
    samples = TrainingSamples(files, weights, seq=10, seed=0, eos=0)
    owner = [int(samples[i]["tokens"][0]) >= 10_000 for i in range(4096)]
    assert sum(owner) == 1024
    fresh = TrainingSamples(files, weights, seq=10, seed=0, eos=0)
    assert np.array_equal(fresh[3000]["tokens"], samples[3000]["tokens"])


def test_a_single_document_is_split_at_its_tail(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)  # bytes: ids 97 and 98, then eos
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "a.txt")),), val_fraction=0.1)
    corpus = prepare(data, TokenizerConfig(), tmp_path / "cache")
    assert [f[0].ids.tolist() for f in (corpus.train, corpus.val)] == [
        [97] * 90 + [256],
        [98] * 10 + [256],
    ]


def test_documents_are_split_whole(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i} " * 30)
    data = DataConfig(sources=(SourceConfig(path=str(folder)),), val_fraction=0.3)
    corpus = prepare(data, TokenizerConfig(), tmp_path / "cache")
    halves = [ByteTokenizer().decode(f[0].ids.tolist()) for f in (corpus.train, corpus.val)]
    numbers = [{w for w in half.split() if w.isdigit()} for half in halves]
    assert numbers[0] | numbers[1] == {str(i) for i in range(40)}
    assert not numbers[0] & numbers[1]


def test_too_little_text_for_one_sequence_at_every_offset_is_an_error() -> None:
    for size in (30, 40):
        with pytest.raises(DataError, match=r"lower train\.sequence_length"):
            TrainingSamples(_files([size]), [1.0], seq=20, seed=0, eos=0)
    enough = TrainingSamples(_files([41]), [1.0], seq=20, seed=0, eos=0)
    assert all(int(enough[i]["targets"][-1]) <= 40 for i in range(50))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")
def test_shakespeare_has_65_characters(tmp_path: Path) -> None:
    data = DataConfig(
        sources=(SourceConfig(path=str(SHAKESPEARE)),), split="tail", val_fraction=0.1
    )
    corpus = prepare(data, TokenizerConfig(kind="char"), tmp_path)
    assert corpus.tokenizer.vocab_size == 66
    assert len(corpus.train[0].ids) == 1_003_855  # 90% of 1,115,394 characters, and eos


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


def test_a_hugging_face_folder_loads_and_a_missing_one_is_named(tmp_path: Path) -> None:
    trained = TokenizerConfig(kind="bpe", vocab_size=300).build(["some text " * 50])
    (tmp_path / "tokenizer.json").write_text(json.loads(trained.dumps())["json"])
    loaded = TokenizerConfig(kind="folder", path=str(tmp_path)).build([])
    assert loaded.encode("some text").tolist() == trained.encode("some text").tolist()
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        TokenizerConfig(kind="folder", path=str(tmp_path / "no")).build([])
    for content, message in (
        ("no", "is not JSON"),
        ("{}", "is no tokenizer"),
        ("\xff", "not UTF-8"),
    ):
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=rf"tokenizer\.json {message}|json is {message}"):
            TokenizerConfig(kind="folder", path=str(tmp_path)).build([])


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


def test_bits_per_byte_count_the_text_not_the_tokens(tmp_path: Path) -> None:
    """WordPiece drops white space; the bytes of the text are counted all the same."""
    file = tmp_path / "a.txt"
    file.write_text("the  cat   sat on the    mat\n\n" * 200)
    data = DataConfig(sources=(SourceConfig(path=str(file)),), split="tail", val_fraction=0.5)
    for kind, lossless in (("wordpiece", False), ("bpe", True), ("bytes", True)):
        size = None if kind == "bytes" else 300
        corpus = prepare(data, TokenizerConfig(kind=kind, vocab_size=size), tmp_path / "cache")  # type: ignore[arg-type]
        assert corpus.val[0].text_bytes == len(file.read_bytes()) // 2
        assert (corpus.bytes_per_counted_byte == 1.0) == lossless
        assert corpus.bytes_per_counted_byte >= 1.0


def test_wordpiece_decodes_its_words() -> None:
    tokenizer = TokenizerConfig(kind="wordpiece", vocab_size=300).build(
        ["the cat sat on the mat"] * 50
    )
    assert tokenizer.decode(tokenizer.encode("the cat sat").tolist()) == "the cat sat"


def test_the_last_window_of_the_validation_split_counts_its_targets_once() -> None:
    (file,) = _files([26])
    batches = list(validation_batches([file], seq=10, batch=2, max_tokens=1000))
    targets = np.concatenate([b["targets"].numpy().ravel() for b in batches])
    assert sorted(targets[targets >= 0]) == list(range(1, 26))
    tokens = np.concatenate([b["tokens"].numpy() for b in batches])
    assert tokens.shape == (3, 10)


def test_text_that_changed_after_the_cell_was_frozen_is_refused(tmp_path: Path, text: Path) -> None:
    data = DataConfig(sources=(SourceConfig(path=str(text)),), split="tail")
    frozen = data.content_hash()
    original = text.read_text()
    text.write_text(original + "!")
    with pytest.raises(DataError, match="has changed since the cell was frozen"):
        prepare(data, TokenizerConfig(), tmp_path / "cache", frozen)
    text.write_text(original)
    prepare(data, TokenizerConfig(), tmp_path / "cache", frozen)
    text.unlink()  # what is cached under the frozen hash needs no text any more
    prepare(data, TokenizerConfig(), tmp_path / "cache", frozen)


def test_a_tokenizers_own_special_tokens_stand_in_training_and_in_the_runs_name(
    tmp_path: Path,
) -> None:
    folder = llama3(tmp_path / "m")
    given = {"_target_": "", "kind": "folder", "path": str(folder)}
    end = with_pretrained({"tokenizer": given})["tokenizer"]["eos_token"]
    assert end == "<|end_of_text|>"  # the folder names it
    own = {"tokenizer": given | {"eos_token": "x"}}
    assert with_pretrained(own) == own
    cfg = TokenizerConfig(kind="folder", path=str(folder), eos_token=end)
    (tmp_path / "a.jsonl").write_text('{"text": "A cat sat"}\n{"text": "the mat"}\n' * 40)
    source = SourceConfig(format="jsonl", path=str(tmp_path / "a.jsonl"))
    data = DataConfig(sources=(source,), split="tail", val_fraction=0.3)
    corpus = prepare(data, cfg, tmp_path / "cache")
    bos, eos = 0, 1
    for file in (corpus.train[0], corpus.val[0]):
        assert len(file.starts) == 80
        assert (file.ids[file.starts] == bos).all()
        assert (file.ids[file.starts[1:] - 1] == eos).all()
        assert (file.ids == eos).sum() == (file.ids == bos).sum() == 80
    assert corpus.bytes_per_counted_byte == 1.0  # special tokens are no bytes
    back = loads(corpus.tokenizer.dumps())  # what a run writes down
    assert prompt_ids(back, "A cat") == [bos, *back.encode("A cat")]
    assert prompt_ids(back, "") == prompt_ids(back, "<|begin_of_text|>") == [bos]
    assert end_ids(back) == (1, 2)
    assert revision(cfg, None) == 2
    # The same tokenizer without them keeps the name that runs had before they counted.
    given = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(given | {"post_processor": None})
    (folder / "tokenizer.json").write_text(text)
    assert revision(cfg, None) == revision(TokenizerConfig(), None) == 1
    assert cfg.content_hash() == hashlib.sha256(text.encode()).hexdigest()[:32]
    plain = prepare(data, cfg, tmp_path / "cache")
    assert bos not in plain.train[0].ids


def test_a_revision_of_the_numbers_makes_new_tokens(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(sources=(SourceConfig(path=str(text)),), split="tail")
    names = lambda: {f.name for f in (tmp_path / "cache").glob("tokens-*")}  # noqa: E731
    prepare(data, TokenizerConfig(), tmp_path / "cache")
    before = names()
    for cls in (SourceConfig, DataConfig):
        monkeypatch.setattr(cls, "numerics", 99)
        prepare(data, TokenizerConfig(), tmp_path / "cache")
        assert len(names() - before) == 1
        before = names()
